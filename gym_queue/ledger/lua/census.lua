-- Count what is known of all runs, at one moment: a run that is just forgotten is counted once.
-- KEYS[1] sorted set   runs               run ids by minus priority
-- KEYS[2] hash         totals             counters of the runs that are forgotten
-- KEYS[3] sorted set   waiting:generate   tickets by the time they were queued
-- KEYS[4] sorted set   waiting:verify     the same for the second stage
-- KEYS[5] sorted set   delayed            tickets of retries by the time they are due
-- The runs' keys are made here, from a prefix (no Redis Cluster; kombu knows none):
--         hash         run:<run>          spec, state, counters
-- ARGV prefix of run keys, then the counters' names
-- Returns {now, counters of forgotten runs, sums of the counters of the others, their states, retries delayed, tickets that
--      wait and since when the oldest does or '', for generate and for verify}.
local time = redis.call('TIME')
local gone, there, states = {}, {}, {}
for i, count in ipairs(redis.call('HMGET', KEYS[2], unpack(ARGV, 2))) do
  gone[i], there[i] = tonumber(count or 0), 0
end
for _, run in ipairs(redis.call('ZRANGE', KEYS[1], 0, -1)) do
  local record = redis.call('HMGET', ARGV[1] .. run, 'state', unpack(ARGV, 2))
  if record[1] then
    states[#states + 1] = record[1]
    for i = 1, #there do
      there[i] = there[i] + tonumber(record[i + 1] or 0)
    end
  end
end
local lines = {}
for i = 3, 4 do
  lines[#lines + 1] = redis.call('ZCARD', KEYS[i])
  lines[#lines + 1] = redis.call('ZRANGE', KEYS[i], 0, 0, 'WITHSCORES')[2] or ''
end
local now = time[1] .. '.' .. string.format('%06d', time[2])
return { now, gone, there, states, redis.call('ZCARD', KEYS[5]), unpack(lines) }
