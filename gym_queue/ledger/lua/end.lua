-- End one rollout from outside, whatever it is doing, and tell its owner. The owner's late write finds the fence closed.
-- KEYS[1] hash         run:<run>             spec, state, counters
-- KEYS[2] hash         group:<run>:<index>   example and samples
-- KEYS[3] sorted set   groups:<run>          indices of examples with open samples
-- KEYS[4] stream       results:<run>         rows of ended rollouts, not yet archived
-- Only the record says who the owner is, so two keys are made here, from prefixes (no Redis Cluster; kombu knows none):
--         sorted set   claims:<worker>       attempts the worker owns, by deadline
--         list         revoked:<worker>      attempts taken from the worker, for it to read
-- ARGV run id, example index, sample index, final state, summary (JSON), row, the attempt that must still wait or '',
--      prefix of claims, prefix of revoked, seconds that revoked is kept, 'failed:CLASS' or ''
-- Returns 1, or 0 if the rollout had ended already, or waits no more.
local field = 's:' .. ARGV[3]
local record = redis.call('HGET', KEYS[2], field)
local at, attempt, worker, losses = string.match(record or '', '^(.-)|(.-)|.-|.-|(.-)|.-|(.*)$')
if not at then
  return 0
end
local running = at == 'generating' or at == 'verifying'
if ARGV[7] ~= '' and (running or attempt ~= ARGV[7]) then
  return 0
end
-- First a write that needs no memory: a Redis that is full lets what follows pass.
redis.call('HDEL', KEYS[2], 'p:' .. ARGV[3], 'e:' .. ARGV[3])
if running then
  local stage = at == 'generating' and 'generate' or 'verify'
  local claim = table.concat({ stage, ARGV[1], ARGV[2], attempt, ARGV[3], losses }, '|')
  redis.call('ZREM', ARGV[8] .. worker, claim)
  redis.call('RPUSH', ARGV[9] .. worker, claim)
  redis.call('EXPIRE', ARGV[9] .. worker, ARGV[10])
end
redis.call('XADD', KEYS[4], '*', 's', ARGV[5], 'r', ARGV[6])
redis.call('HINCRBY', KEYS[1], ARGV[4], 1)
if ARGV[11] ~= '' then
  redis.call('HINCRBY', KEYS[1], ARGV[11], 1)
end
if at == 'queued' then
  redis.call('HINCRBY', KEYS[1], 'queued', -1)
end
if redis.call('HINCRBY', KEYS[2], 'open', -1) == 0 then
  redis.call('DEL', KEYS[2])
  redis.call('ZREM', KEYS[3], ARGV[2])
else
  redis.call('HSET', KEYS[2], field, ARGV[4])
end
return 1
