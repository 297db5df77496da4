-- Forget a worker that is gone, once it owns nothing.
-- KEYS[1] sorted set   leases            workers by last heartbeat
-- KEYS[2] hash         worker:<worker>   what the worker says of itself
-- KEYS[3] sorted set   claims:<worker>   attempts the worker owns
-- ARGV worker
-- Returns 1, or 0 if it still owns something.
if redis.call('ZCARD', KEYS[3]) > 0 then
  return 0
end
redis.call('ZREM', KEYS[1], ARGV[1])
redis.call('DEL', KEYS[2])
return 1
