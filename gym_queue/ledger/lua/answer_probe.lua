-- A worker has seen that it was asked: note how long that took.
-- KEYS[1] hash   probes        by worker: when it was asked
-- KEYS[2] hash   round_trips   by worker: seconds from question to answer, the last time
-- ARGV worker
-- Returns 1, or 0 if nobody asked.
local asked = redis.call('HGET', KEYS[1], ARGV[1])
if not asked then
  return 0
end
local time = redis.call('TIME')
redis.call('HDEL', KEYS[1], ARGV[1])
redis.call('HSET', KEYS[2], ARGV[1], string.format('%.6f', time[1] - asked + time[2] / 1000000))
return 1
