-- Create a run, or name the one submitted under the same idempotency key.
-- KEYS[1] string       idempotency:<key>   id of the run submitted under this key
-- KEYS[2] hash         run:<run>           spec, state, counters
-- KEYS[3] sorted set   runs                run ids by minus priority
-- The run that stands under the key may be another, so its key is made here (no Redis Cluster; kombu knows none).
-- ARGV run id, spec (JSON), minus priority, idempotency key, model, prefix of run keys, then names of fields of a run
-- Returns those fields of the run that stands under the key, or nil if the run id was submitted under another key.
local known = redis.call('GET', KEYS[1])
if known then
  return redis.call('HMGET', ARGV[6] .. known, unpack(ARGV, 7))
end
if redis.call('EXISTS', KEYS[2]) == 1 then
  return nil
end
redis.call('SET', KEYS[1], ARGV[1])
local time = redis.call('TIME')
local now = time[1] .. '.' .. string.format('%06d', time[2])
redis.call('HSET', KEYS[2], 'spec', ARGV[2], 'state', 'open', 'opened', now, 'key', ARGV[4], 'model', ARGV[5])
redis.call('ZADD', KEYS[3], ARGV[3], ARGV[1])
return redis.call('HMGET', KEYS[2], unpack(ARGV, 7))
