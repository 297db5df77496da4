-- Write the outcome of an attempt, if that attempt is the newest and still running.
-- KEYS[1] hash         run:<run>             spec, state, counters
-- KEYS[2] hash         group:<run>:<index>   example and samples
-- KEYS[3] sorted set   claims:<worker>       attempts the worker owns, by deadline
-- KEYS[4] sorted set   waiting:generate      tickets by the time they were queued
-- KEYS[5] sorted set   waiting:verify        the same for the second stage
-- KEYS[6] sorted set   delayed               tickets of retries by the time they are due
-- KEYS[7] sorted set   groups:<run>          indices of examples with open samples
-- KEYS[8] stream       results:<run>         rows of ended rollouts, not yet archived
-- ARGV kind, stage, example index, sample index, attempt, worker, claim, and by kind:
--      generated: payload, ticket to verify
--      ended:     final state, summary (JSON), row
--      retry:     delay in seconds, 1 if the failure counts else 0, ticket of the next attempt
-- Returns 1 if written, 0 if refused.
local running = ARGV[2] == 'generate' and 'generating' or 'verifying'
local field, payload = 's:' .. ARGV[4], 'p:' .. ARGV[4]
local record = redis.call('HGET', KEYS[2], field)
redis.call('ZREM', KEYS[3], ARGV[7])
local at, attempt, failures, since, worker = string.match(record or '', '^(.-)|(.-)|(.-)|(.-)|(.-)|')
if at ~= running or attempt ~= ARGV[5] or worker ~= ARGV[6] then
  if redis.call('EXISTS', KEYS[1]) == 1 then
    redis.call('HINCRBY', KEYS[1], 'refused', 1)
  end
  return 0
end
local time = redis.call('TIME')
local now = time[1] .. '.' .. string.format('%06d', time[2])

if ARGV[1] == 'generated' then
  redis.call('HSET', KEYS[2], field, 'verify_queued|1|0|' .. now .. '||', payload, ARGV[8])
  redis.call('ZADD', KEYS[5], now, ARGV[9])
elseif ARGV[1] == 'ended' then
  redis.call('XADD', KEYS[8], '*', 's', ARGV[9], 'r', ARGV[10])
  redis.call('HINCRBY', KEYS[1], ARGV[8], 1)
  if redis.call('HINCRBY', KEYS[2], 'open', -1) == 0 then
    redis.call('DEL', KEYS[2])
    redis.call('ZREM', KEYS[7], ARGV[3])
  else
    redis.call('HSET', KEYS[2], field, ARGV[8])
    redis.call('HDEL', KEYS[2], payload)
  end
else
  local waiting = ARGV[2] == 'generate' and 'queued' or 'verify_queued'
  local due = tonumber(now) + tonumber(ARGV[8])
  local next_record = { waiting, attempt + 1, failures + tonumber(ARGV[9]), string.format('%.6f', due), '', '' }
  redis.call('HSET', KEYS[2], field, table.concat(next_record, '|'))
  redis.call('HINCRBY', KEYS[1], 'retried', ARGV[9])
  if ARGV[2] == 'generate' then
    redis.call('HINCRBY', KEYS[1], 'queued', 1)
  end
  if tonumber(ARGV[8]) > 0 then
    redis.call('ZADD', KEYS[6], due, ARGV[10])
  else
    redis.call('ZADD', ARGV[2] == 'generate' and KEYS[4] or KEYS[5], now, ARGV[10])
  end
end
return 1
