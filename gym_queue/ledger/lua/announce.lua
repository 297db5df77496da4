-- Make weights the newest of their model, unless these or newer ones were announced.
-- KEYS[1] hash         weights              newest announced weights by model: version, nonce, URI
-- ARGV model, version, nonce of this call, URI
-- Returns 1 if they are the newest now, else 0.
-- Versions are compared as decimal digits: Lua's numbers tell whole ones apart up to 2^53 only, a time in nanoseconds is more.
-- The nonce lets a call whose answer was lost be repeated: what it announced is not news of somebody else's.
local known, nonce = string.match(redis.call('HGET', KEYS[1], ARGV[1]) or '', '^(%d+) (%x+) ')
if known == ARGV[2] and nonce == ARGV[3] then
  return 1
end
if known and (#known > #ARGV[2] or (#known == #ARGV[2] and known >= ARGV[2])) then
  return 0
end
redis.call('HSET', KEYS[1], ARGV[1], table.concat({ ARGV[2], ARGV[3], ARGV[4] }, ' '))
return 1
