-- Read all runs.
-- KEYS[1] sorted set   runs        run ids by minus priority
-- The runs' keys are made here, from a prefix (no Redis Cluster; kombu knows none):
--         hash         run:<run>   spec, state, counters
-- ARGV prefix of run keys, then names of fields
-- Returns the fields of each run, highest priority first.
local found = {}
for i, run in ipairs(redis.call('ZRANGE', KEYS[1], 0, -1)) do
  found[i] = redis.call('HMGET', ARGV[1] .. run, unpack(ARGV, 2))
end
return found
