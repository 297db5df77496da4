-- Write the outcome of an attempt, if that attempt is the newest and still running.
-- KEYS[1] hash         run:<run>             spec, state, counters
-- KEYS[2] hash         group:<run>:<index>   example and samples
-- KEYS[3] sorted set   claims:<worker>       attempts the worker owns, by deadline
-- KEYS[4] sorted set   waiting:generate      tickets by the time they were queued
-- KEYS[5] sorted set   waiting:verify        the same for the second stage
-- KEYS[6] sorted set   delayed               tickets of retries by the time they are due
-- KEYS[7] sorted set   groups:<run>          indices of examples with open samples
-- KEYS[8] stream       results:<run>         rows of ended rollouts, not yet archived
-- KEYS[9] list         revoked:<worker>      attempts taken from the worker, for it to read
-- KEYS[10] list        written:<worker>      nonces of the worker's newest commits, newest first
-- ARGV kind, stage, example index, sample index, attempt, worker, claim, nonce of this call, seconds to keep what is
--      revoked or 0 to revoke nothing, and by kind:
--      generated: payload, ticket to verify
--      ended:     final state, summary (JSON), row, 'failed:CLASS' or '', prompt tokens, completion tokens
--      retry:     delay in seconds, 1 if the failure counts else 0, ticket of the next attempt, 1 if the worker died else
--                 0, reason or ''
-- Returns 1 if written, 0 if refused.
-- The nonce lets a call whose answer was lost be repeated: what it wrote, it is told again. As many are kept as can be on
-- their way at once, and more.
local running = ARGV[2] == 'generate' and 'generating' or 'verifying'
local field, payload, reason = 's:' .. ARGV[4], 'p:' .. ARGV[4], 'e:' .. ARGV[4]
local record = redis.call('HGET', KEYS[2], field)
-- First a write that needs no memory: a Redis that is full lets what follows pass.
redis.call('ZREM', KEYS[3], ARGV[7])
local at, attempt, failures, worker = string.match(record or '', '^(.-)|(.-)|(.-)|.-|(.-)|')
if at ~= running or attempt ~= ARGV[5] or worker ~= ARGV[6] then
  if redis.call('LPOS', KEYS[10], ARGV[8]) then
    return 1
  end
  if redis.call('EXISTS', KEYS[1]) == 1 then
    redis.call('HINCRBY', KEYS[1], 'refused', 1)
  end
  return 0
end
local time = redis.call('TIME')
local now = time[1] .. '.' .. string.format('%06d', time[2])
if ARGV[9] ~= '0' then
  redis.call('RPUSH', KEYS[9], ARGV[7])
  redis.call('EXPIRE', KEYS[9], ARGV[9])
end
local written = redis.call('LPUSH', KEYS[10], ARGV[8])
if written == 1 then
  redis.call('EXPIRE', KEYS[10], 3600)
elseif written > 1500 then
  redis.call('LTRIM', KEYS[10], 0, 999)
end
redis.call('HDEL', KEYS[2], reason)

if ARGV[1] == 'generated' then
  redis.call('HSET', KEYS[2], field, 'verify_queued|1|0|' .. now .. '|||', payload, ARGV[10])
  redis.call('ZADD', KEYS[5], now, ARGV[11])
elseif ARGV[1] == 'ended' then
  redis.call('XADD', KEYS[8], '*', 's', ARGV[11], 'r', ARGV[12])
  redis.call('HINCRBY', KEYS[1], ARGV[10], 1)
  if ARGV[13] ~= '' then
    redis.call('HINCRBY', KEYS[1], ARGV[13], 1)
  end
  if ARGV[14] ~= '0' then
    redis.call('HINCRBY', KEYS[1], 'prompt_tokens', ARGV[14])
    redis.call('HINCRBY', KEYS[1], 'completion_tokens', ARGV[15])
  end
  if redis.call('HINCRBY', KEYS[2], 'open', -1) == 0 then
    redis.call('DEL', KEYS[2])
    redis.call('ZREM', KEYS[7], ARGV[3])
  else
    redis.call('HSET', KEYS[2], field, ARGV[10])
    redis.call('HDEL', KEYS[2], payload)
  end
else
  local waiting = ARGV[2] == 'generate' and 'queued' or 'verify_queued'
  local due = tonumber(now) + tonumber(ARGV[10])
  local next_record = { waiting, attempt + 1, failures + tonumber(ARGV[11]), string.format('%.6f', due), '', '', '' }
  redis.call('HSET', KEYS[2], field, table.concat(next_record, '|'))
  if ARGV[14] ~= '' then
    redis.call('HSET', KEYS[2], reason, ARGV[14])
  end
  redis.call('HINCRBY', KEYS[1], 'retried', ARGV[11])
  redis.call('HINCRBY', KEYS[1], 'lost', ARGV[13])
  if ARGV[2] == 'generate' then
    redis.call('HINCRBY', KEYS[1], 'queued', 1)
  end
  if tonumber(ARGV[10]) > 0 then
    redis.call('ZADD', KEYS[6], due, ARGV[12])
  else
    redis.call('ZADD', ARGV[2] == 'generate' and KEYS[4] or KEYS[5], now, ARGV[12])
  end
end
return 1
