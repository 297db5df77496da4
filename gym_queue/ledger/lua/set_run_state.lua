-- Move a run to another state; final states stay. To open it starts its rollouts' time anew.
-- KEYS[1] hash   run:<run>   spec, state, counters
-- ARGV new state
-- Returns 1, or 0 if there is no such run or its state is final.
local state = redis.call('HGET', KEYS[1], 'state')
if not state or state == 'cancelled' or state == 'ended' then
  return 0
end
redis.call('HDEL', KEYS[1], 'state') -- a write that needs no memory: a Redis that is full lets what follows pass
redis.call('HSET', KEYS[1], 'state', ARGV[1])
if ARGV[1] == 'open' then
  local time = redis.call('TIME')
  redis.call('HSET', KEYS[1], 'opened', time[1] .. '.' .. string.format('%06d', time[2]))
end
return 1
