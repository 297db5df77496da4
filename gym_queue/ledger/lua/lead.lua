-- Take an office, or hold it for longer.
-- KEYS[1] string   office:<office>   who holds it; expires with the term
-- ARGV who wants it, milliseconds
-- Returns 1, or 0 if another holds it.
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then
  return 0
end
redis.call('DEL', KEYS[1]) -- a write that needs no memory: a Redis that is full lets what follows pass
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
