-- Move a run to another state; final states stay.
-- KEYS[1] hash   run:<run>   spec, state, counters
-- ARGV new state
-- Returns 1, or 0 if there is no such run or its state is final.
local state = redis.call('HGET', KEYS[1], 'state')
if not state or state == 'cancelled' or state == 'ended' then
  return 0
end
redis.call('HDEL', KEYS[1], 'state') -- a write that needs no memory: a Redis that is full lets what follows pass
redis.call('HSET', KEYS[1], 'state', ARGV[1])
return 1
