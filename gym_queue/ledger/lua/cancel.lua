-- End one rollout as cancelled, whatever it is doing. Its owner's late write will find the fence closed.
-- KEYS[1] hash         run:<run>             spec, state, counters
-- KEYS[2] hash         group:<run>:<index>   example and samples
-- KEYS[3] sorted set   groups:<run>          indices of examples with open samples
-- KEYS[4] stream       results:<run>         rows of ended rollouts, not yet archived
-- ARGV example index, sample index, summary (JSON), row
-- Returns 1, or 0 if the rollout had ended already.
local field = 's:' .. ARGV[2]
local record = redis.call('HGET', KEYS[2], field)
if not record or not string.find(record, '|', 1, true) then
  return 0
end
redis.call('XADD', KEYS[4], '*', 's', ARGV[3], 'r', ARGV[4])
redis.call('HINCRBY', KEYS[1], 'cancelled', 1)
if string.sub(record, 1, 7) == 'queued|' then
  redis.call('HINCRBY', KEYS[1], 'queued', -1)
end
if redis.call('HINCRBY', KEYS[2], 'open', -1) == 0 then
  redis.call('DEL', KEYS[2])
  redis.call('ZREM', KEYS[3], ARGV[1])
else
  redis.call('HSET', KEYS[2], field, 'cancelled')
  redis.call('HDEL', KEYS[2], 'p:' .. ARGV[2])
end
return 1
