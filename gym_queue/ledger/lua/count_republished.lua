-- Count tickets that the broker lacked and got again. A run that is forgotten stays so.
-- KEYS[1] hash   run:<run>   spec, state, counters
-- ARGV how many
-- Returns nothing.
if redis.call('EXISTS', KEYS[1]) == 1 then
  redis.call('HDEL', KEYS[1], '') -- a write that needs no memory: a Redis that is full lets what follows pass
  redis.call('HINCRBY', KEYS[1], 'republished', ARGV[1])
end
