-- Write the outcomes of samples of one ticket that ended alike, each if its attempt is the newest and still running.
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
-- ARGV kind, stage, example index, attempt, worker, seconds to keep what is revoked or 0 to revoke nothing; then for each
--      sample its index, claim, nonce of its call, and by kind:
--      generated: payload, ticket to verify
--      ended:     final state, summary (JSON), row, 'failed:CLASS' or '', prompt tokens, completion tokens
--      retry:     delay in seconds, 1 if the failure counts else 0, ticket of the next attempt, 1 if the worker died else
--                 0, reason or ''
-- Returns for each sample 1 if written, 0 if refused.
-- The nonce lets a call whose answer was lost be repeated: what it wrote, it is told again. As many are kept as can be on
-- their way at once, and more.
local kind = ARGV[1]
local width = ({ generated = 5, ended = 9, retry = 8 })[kind]
local running = ARGV[2] == 'generate' and 'generating' or 'verifying'
local claims, fields = {}, {}
for a = 7, #ARGV, width do
  fields[#fields + 1] = 's:' .. ARGV[a]
  claims[#claims + 1] = ARGV[a + 1]
end
local records = redis.call('HMGET', KEYS[2], unpack(fields))
-- First a write that needs no memory: a Redis that is full lets what follows pass.
redis.call('ZREM', KEYS[3], unpack(claims))

-- Who was cancelled may have left a call behind, and make another of the same attempt: the first one counts.
local answers, wanted, nonces, forgotten, failures, taken = {}, {}, {}, {}, {}, {}
local refused = 0
for i, record in ipairs(records) do
  local a = 7 + (i - 1) * width
  local at, attempt, failed, worker = string.match(record or '', '^(.-)|(.-)|(.-)|.-|(.-)|')
  if at == running and attempt == ARGV[4] and worker == ARGV[5] and not taken[fields[i]] then
    taken[fields[i]] = true
    answers[i] = 1
    failures[i] = failed
    wanted[#wanted + 1] = i
    nonces[#nonces + 1] = ARGV[a + 2]
    forgotten[#forgotten + 1] = 'e:' .. ARGV[a]
  elseif redis.call('LPOS', KEYS[10], ARGV[a + 2]) then
    answers[i] = 1
  else
    answers[i] = 0
    refused = refused + 1
  end
end
if refused > 0 and redis.call('EXISTS', KEYS[1]) == 1 then
  redis.call('HINCRBY', KEYS[1], 'refused', refused)
end
if #wanted == 0 then
  return answers
end
if ARGV[6] ~= '0' then
  for _, i in ipairs(wanted) do
    redis.call('RPUSH', KEYS[9], claims[i])
  end
  redis.call('EXPIRE', KEYS[9], ARGV[6])
end
local written = redis.call('LPUSH', KEYS[10], unpack(nonces))
if written == #nonces then
  redis.call('EXPIRE', KEYS[10], 3600)
elseif written > 1500 then
  redis.call('LTRIM', KEYS[10], 0, 999)
end

if kind == 'ended' then
  local counts, ended = {}, {}
  local function count(what, by)
    counts[what] = (counts[what] or 0) + by
  end
  for _, i in ipairs(wanted) do
    local a = 7 + (i - 1) * width
    redis.call('XADD', KEYS[8], '*', 's', ARGV[a + 4], 'r', ARGV[a + 5])
    count(ARGV[a + 3], 1)
    count(ARGV[a + 6], 1)
    count('prompt_tokens', tonumber(ARGV[a + 7]))
    count('completion_tokens', tonumber(ARGV[a + 8]))
    ended[#ended + 1] = fields[i]
    ended[#ended + 1] = ARGV[a + 3]
    forgotten[#forgotten + 1] = 'p:' .. ARGV[a]
  end
  counts[''] = nil
  for what, by in pairs(counts) do
    if by ~= 0 then
      redis.call('HINCRBY', KEYS[1], what, by)
    end
  end
  if redis.call('HINCRBY', KEYS[2], 'open', -#wanted) == 0 then
    redis.call('DEL', KEYS[2])
    redis.call('ZREM', KEYS[7], ARGV[3])
  else
    redis.call('HSET', KEYS[2], unpack(ended))
    redis.call('HDEL', KEYS[2], unpack(forgotten))
  end
  return answers
end

redis.call('HDEL', KEYS[2], unpack(forgotten))
local time = redis.call('TIME')
local now = time[1] .. '.' .. string.format('%06d', time[2])
for _, i in ipairs(wanted) do
  local a = 7 + (i - 1) * width
  if kind == 'generated' then
    redis.call('HSET', KEYS[2], fields[i], 'verify_queued|1|0|' .. now .. '|||', 'p:' .. ARGV[a], ARGV[a + 3])
    redis.call('ZADD', KEYS[5], now, ARGV[a + 4])
  else
    local waiting = ARGV[2] == 'generate' and 'queued' or 'verify_queued'
    local due = tonumber(now) + tonumber(ARGV[a + 3])
    local failed = failures[i] + tonumber(ARGV[a + 4])
    local next_record = { waiting, ARGV[4] + 1, failed, string.format('%.6f', due), '', '', '' }
    redis.call('HSET', KEYS[2], fields[i], table.concat(next_record, '|'))
    if ARGV[a + 7] ~= '' then
      redis.call('HSET', KEYS[2], 'e:' .. ARGV[a], ARGV[a + 7])
    end
    redis.call('HINCRBY', KEYS[1], 'retried', ARGV[a + 4])
    redis.call('HINCRBY', KEYS[1], 'lost', ARGV[a + 6])
    if ARGV[2] == 'generate' then
      redis.call('HINCRBY', KEYS[1], 'queued', 1)
    end
    if tonumber(ARGV[a + 3]) > 0 then
      redis.call('ZADD', KEYS[6], due, ARGV[a + 5])
    else
      redis.call('ZADD', ARGV[2] == 'generate' and KEYS[4] or KEYS[5], now, ARGV[a + 5])
    end
  end
end
return answers
