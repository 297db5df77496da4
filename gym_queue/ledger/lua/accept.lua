-- Take the next examples of a run's input, exactly once.
-- KEYS[1] hash         run:<run>                spec, state, counters
-- KEYS[2] sorted set   waiting:generate         tickets by the time they were queued
-- KEYS[3] sorted set   groups:<run>             indices of examples with open samples
-- KEYS[4..] hash       group:<run>:<index>      example and samples, one key a group
-- ARGV cursor, next cursor, then four a group: example index, samples ("0,1,2"), example (JSON), ticket
-- Redis takes no new work when it is nearly full: what was accepted needs room to end, and the broker for its tickets.
-- Returns 1 if accepted now, 2 if this very call was accepted before, 0 if the run is not open or stands elsewhere.
local run = redis.call('HMGET', KEYS[1], 'state', 'cursor')
if run[1] ~= 'open' then
  return 0
end
local cursor = run[2] or '0'
if cursor ~= ARGV[1] then
  return cursor == ARGV[2] and 2 or 0
end
local memory = redis.call('INFO', 'memory')
local used = tonumber(string.match(memory, '\nused_memory:(%d+)'))
local most = tonumber(string.match(memory, '\nmaxmemory:(%d+)'))
if most > 0 and used > 0.9 * most then
  return redis.error_reply('OOM new work not allowed when used memory > 90 % of maxmemory')
end
local time = redis.call('TIME')
local now = time[1] .. '.' .. string.format('%06d', time[2])
local accepted = 0
for g = 4, #KEYS do
  local a = (g - 4) * 4 + 3
  local fields = { 'example', ARGV[a + 2], 'at', now }
  local samples = 0
  for sample in string.gmatch(ARGV[a + 1], '%d+') do
    fields[#fields + 1] = 's:' .. sample
    fields[#fields + 1] = 'queued|1|0|' .. now .. '|||'
    samples = samples + 1
  end
  fields[#fields + 1] = 'open'
  fields[#fields + 1] = samples
  redis.call('HSET', KEYS[g], unpack(fields))
  redis.call('ZADD', KEYS[3], ARGV[a], ARGV[a])
  redis.call('ZADD', KEYS[2], now, ARGV[a + 3])
  accepted = accepted + samples
end
redis.call('HSET', KEYS[1], 'cursor', ARGV[2])
redis.call('HINCRBY', KEYS[1], 'accepted', accepted)
redis.call('HINCRBY', KEYS[1], 'queued', accepted)
return 1
