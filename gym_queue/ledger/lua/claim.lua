-- Take ownership of the samples of a ticket that are still wanted.
-- KEYS[1] hash         run:<run>             spec, state, counters
-- KEYS[2] hash         group:<run>:<index>   example and samples
-- KEYS[3] sorted set   waiting:<stage>       tickets by the time they were queued
-- KEYS[4] sorted set   claims:<worker>       attempts the worker owns, by deadline
-- KEYS[5] sorted set   leases                workers by last heartbeat
-- KEYS[6] hash         weights              newest announced weights by model
-- ARGV waiting state, running state, attempt, worker, nonce of this call, lease in seconds, ticket, losses, then two a
--      sample: sample index, claim
-- Returns nil if nothing is granted, else {now, run opened at, example, accepted at, model, weights or '', {sample, queued at, failures, payload or ''}, ...}.
-- An owner without a lease gets one, for the sweep looks for claims under leases: it may have been given up for dead.
-- A ticket of a paused run goes to the end of the line, so that the audit gets to see those of other runs.
-- The nonce lets a call whose answer was lost be repeated: what it was granted, it is granted again.
local time = redis.call('TIME')
local now = time[1] .. '.' .. string.format('%06d', time[2])
local state, opened, model = unpack(redis.call('HMGET', KEYS[1], 'state', 'opened', 'model'))
if state == 'paused' and ARGV[1] == 'queued' then
  redis.call('ZREM', KEYS[3], '') -- a write that needs no memory: a Redis that is full lets what follows pass
  redis.call('ZADD', KEYS[3], 'XX', now, ARGV[7])
  return nil
end
redis.call('ZREM', KEYS[3], ARGV[7]) -- the same, first
local deadline = tonumber(now) + tonumber(ARGV[6])
local granted, owned, claims = {}, {}, {}
local started = 0
local records = {}
if state == 'open' or state == 'paused' then
  local fields = {}
  for a = 9, #ARGV, 2 do
    fields[#fields + 1] = 's:' .. ARGV[a]
  end
  records = redis.call('HMGET', KEYS[2], unpack(fields))
end
for i, record in ipairs(records) do
  local a = 7 + 2 * i
  local at, attempt, failures, since, worker, nonce =
    string.match(record or '', '^(.-)|(.-)|(.-)|(.-)|(.-)|(.-)|')
  local mine = at == ARGV[2] and worker == ARGV[4] and nonce == ARGV[5]
  if attempt == ARGV[3] and (at == ARGV[1] or mine) then
    local payload = ARGV[2] == 'verifying' and redis.call('HGET', KEYS[2], 'p:' .. ARGV[a])
    owned[#owned + 1] = 's:' .. ARGV[a]
    owned[#owned + 1] = table.concat({ ARGV[2], attempt, failures, since, ARGV[4], ARGV[5], ARGV[8] }, '|')
    claims[#claims + 1] = deadline
    claims[#claims + 1] = ARGV[a + 1]
    if at == 'queued' then
      started = started + 1
    end
    granted[#granted + 1] = { ARGV[a], since, failures, payload or '' }
  end
end
if #granted == 0 then
  if state then
    redis.call('HINCRBY', KEYS[1], 'dropped', 1)
  end
  return nil
end
redis.call('HSET', KEYS[2], unpack(owned))
redis.call('ZADD', KEYS[4], unpack(claims))
if started > 0 then
  redis.call('HINCRBY', KEYS[1], 'queued', -started)
end
redis.call('ZADD', KEYS[5], 'NX', now, ARGV[4])
local group = redis.call('HMGET', KEYS[2], 'example', 'at')
local weights = ARGV[1] == 'queued' and model and redis.call('HGET', KEYS[6], model)
return { now, opened, group[1], group[2], model or '', weights or '', unpack(granted) }
