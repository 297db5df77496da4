-- Give an office back, if it is still ours.
-- KEYS[1] string   office:<office>   who holds it
-- ARGV who gives it back
-- Returns 1, or 0 if another holds it, or nobody.
if redis.call('GET', KEYS[1]) ~= ARGV[1] then
  return 0
end
return redis.call('DEL', KEYS[1])
