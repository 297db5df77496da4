-- Forget a worker that is gone, once it owns nothing.
-- KEYS[1] sorted set   leases            workers by last heartbeat
-- KEYS[2] hash         worker:<worker>   what the worker says of itself
-- KEYS[3] sorted set   claims:<worker>   attempts the worker owns
-- KEYS[4] hash         probes            by worker: when it was asked
-- KEYS[5] hash         round_trips       by worker: seconds from question to answer
-- ARGV worker
-- Returns 1, or 0 if it still owns something.
if redis.call('ZCARD', KEYS[3]) > 0 then
  return 0
end
redis.call('ZREM', KEYS[1], ARGV[1])
redis.call('DEL', KEYS[2])
redis.call('HDEL', KEYS[4], ARGV[1])
redis.call('HDEL', KEYS[5], ARGV[1])
return 1
