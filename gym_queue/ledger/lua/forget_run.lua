-- Delete all that is known of a run, but for its tickets in lines that it shares with other runs.
-- KEYS[1] hash         run:<run>       spec, state, counters
-- KEYS[2] sorted set   runs            run ids by minus priority
-- KEYS[3] sorted set   groups:<run>    indices of examples with open samples
-- KEYS[4] stream       results:<run>   rows of ended rollouts, not yet archived
-- KEYS[5] hash         totals          counters of the runs that are forgotten
-- The rest is named by the run's own records, so it is made here, from prefixes (no Redis Cluster; kombu knows none):
--         string       idempotency:<key>     id of the run
--         hash         group:<run>:<index>   example and samples
-- ARGV run id, prefix of idempotency keys, prefix of the run's groups, then the names of the counters that outlive it
-- Returns nothing.
local key = redis.call('HGET', KEYS[1], 'key')
local counts = redis.call('HMGET', KEYS[1], unpack(ARGV, 4))
for _, index in ipairs(redis.call('ZRANGE', KEYS[3], 0, -1)) do
  redis.call('UNLINK', ARGV[3] .. index)
end
redis.call('UNLINK', KEYS[1], KEYS[3], KEYS[4])
redis.call('ZREM', KEYS[2], ARGV[1])
if key then
  redis.call('DEL', ARGV[2] .. key)
end
for i, count in ipairs(counts) do
  if count and count ~= '0' then
    redis.call('HINCRBY', KEYS[5], ARGV[i + 3], count)
  end
end
