-- Ask all workers to say that they are there; one that was asked and has not answered yet is not asked again.
-- KEYS[1] sorted set   leases   workers, and servers, by last heartbeat
-- KEYS[2] hash         probes   by worker: when it was asked
-- The workers' own keys are made here, from a prefix (no Redis Cluster; kombu knows none):
--         hash         worker:<worker>   what the worker says of itself
-- ARGV prefix of worker keys, the kind of a server: those do not look here, nor does who has not said yet what it is
-- Returns how many were asked now.
local time = redis.call('TIME')
local now = time[1] .. '.' .. string.format('%06d', time[2])
redis.call('ZREM', KEYS[1], '') -- a write that needs no memory: a Redis that is full lets what follows pass
local asked = 0
for _, worker in ipairs(redis.call('ZRANGE', KEYS[1], 0, -1)) do
  local kind = redis.call('HGET', ARGV[1] .. worker, 'kind')
  if kind and kind ~= ARGV[2] then
    asked = asked + redis.call('HSETNX', KEYS[2], worker, now)
  end
end
return asked
