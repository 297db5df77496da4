-- Renew a worker's lease.
-- KEYS[1] sorted set   leases            workers by last heartbeat
-- KEYS[2] hash         worker:<worker>   what the worker says of itself
-- ARGV worker, then field and value of what it says
-- Returns 1 if the lease was known, 0 if it is new (or was reaped meanwhile).
local time = redis.call('TIME')
local now = time[1] .. '.' .. string.format('%06d', time[2])
redis.call('DEL', KEYS[2])
redis.call('HSET', KEYS[2], unpack(ARGV, 2))
return 1 - redis.call('ZADD', KEYS[1], now, ARGV[1])
