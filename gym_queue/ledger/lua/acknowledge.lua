-- Drop results that the archive holds, and count them: this opens the window for as many new rollouts.
-- KEYS[1] hash     run:<run>       spec, state, counters
-- KEYS[2] stream   results:<run>   rows of ended rollouts
-- ARGV first position to keep
-- Returns how many were dropped.
local dropped = redis.call('XTRIM', KEYS[2], 'MINID', '=', ARGV[1])
if dropped > 0 then
  redis.call('HINCRBY', KEYS[1], 'archived', dropped)
end
return dropped
