-- Move retries whose delay is over to the waiting tickets.
-- KEYS[1] sorted set   delayed            tickets by the time they are due
-- KEYS[2] sorted set   waiting:generate   tickets by the time they were queued
-- KEYS[3] sorted set   waiting:verify     the same for the second stage
-- ARGV most tickets to move
-- Returns the tickets.
local time = redis.call('TIME')
local now = time[1] .. '.' .. string.format('%06d', time[2])
local due = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now, 'LIMIT', 0, ARGV[1])
for _, ticket in ipairs(due) do
  redis.call('ZREM', KEYS[1], ticket)
  local verify = string.sub(ticket, 1, 7) == 'verify|'
  redis.call('ZADD', verify and KEYS[3] or KEYS[2], now, ticket)
end
return due
