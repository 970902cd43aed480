-- Limits of requests, tokens, concurrency and budgets, and the counters of usage: everything one batch does, atomically.
--
-- KEYS[1]  prefix of all keys
-- ARGV     1 instance (one gateway process)    2 fence: admissions of this instance up to this number never happen any more
--          3 number of the batch of writes     4 the writes (MessagePack, or empty)
--          5 number of the batch of admissions 6 the admissions (MessagePack, or empty)
--          7 life of a lease, microseconds     8 the time in microseconds, or empty for Redis' own clock
-- Answer   MessagePack {1, day, results, time}; {0} where the admissions were fenced off. A result is
--          {1, request bucket, left, reset, token bucket, left, reset} or {0, subject, kind, wait, ...the same six}.
--
-- A subject is {name, requests, per, burst, tokens, per, burst, concurrency, daily tokens, monthly tokens, daily cost, monthly cost};
-- -1: no such limit. Times are microseconds, costs millionths of the currency.
--
-- The clock is this Redis' clock. Where it jumps back, a bucket goes on from the new time with the level it had, and leases
-- that would end too late are shortened: nothing is freed and nothing stays blocked.

local PREFIX = KEYS[1]
local INSTANCE = PREFIX .. ':instance:' .. ARGV[1]
local FENCE, WRITES, ADMITS, LEASE = tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[5]), tonumber(ARGV[7])
-- Levels are doubles: a rounding error must not refuse the last whole request.
local EPSILON = 1e-6
local MOST_TTL = 40 * 86400 * 1000
local KEEP_USAGE = 400 * 86400
local SLOTS = 8
local CHUNK = 1000

local NOW = tonumber(ARGV[8])
if not NOW then
  local time = redis.call('TIME')
  NOW = time[1] * 1000000 + time[2]
end
local DAYS = math.floor(NOW / 86400000000)

-- Days since 1970 to a date: Howard Hinnant, "chrono-Compatible Low-Level Date Algorithms", civil_from_days.
local function date(days)
  local z = days + 719468
  local era = math.floor(z / 146097)
  local doe = z - era * 146097
  local yoe = math.floor((doe - math.floor(doe / 1460) + math.floor(doe / 36524) - math.floor(doe / 146096)) / 365)
  local doy = doe - (365 * yoe + math.floor(yoe / 4) - math.floor(yoe / 100))
  local mp = math.floor((5 * doy + 2) / 153)
  local month = mp < 10 and mp + 3 or mp - 9
  return yoe + era * 400 + (month <= 2 and 1 or 0), month, doy - math.floor((153 * mp + 2) / 5) + 1
end

local YEAR, MONTH, DAY_OF_MONTH = date(DAYS)
local DAY = string.format('%04d%02d%02d', YEAR, MONTH, DAY_OF_MONTH)
local MONTH_NAME = string.sub(DAY, 1, 6)

local function days_of_month()
  local day = DAYS + 28 - DAY_OF_MONTH
  while true do
    local _, month, _ = date(day + 1)
    if month ~= MONTH then return day - DAYS + DAY_OF_MONTH end
    day = day + 1
  end
end

-- Buckets: {request level, token level, time of both}, kept until they would be full, which is the same as not there.
local buckets = {}

local function bucket(spec)
  local name = spec[1]
  local b = buckets[name]
  if not b then
    local raw = redis.call('GET', PREFIX .. ':bucket:' .. name)
    if raw then
      local r, t, at = struct.unpack('<ddd', raw)
      b = {r, t, at}
    else
      b = {math.huge, math.huge, NOW}
    end
    buckets[name] = b
  end
  b.spec = spec
  local passed = NOW - b[3]
  if passed < 0 then
    -- Kept even where nothing is admitted: the bucket would else wait for the old time to come again.
    passed, b.changed = 0, true
  end
  b[3] = NOW
  if spec[2] >= 0 then b[1] = math.min(spec[4], b[1] + passed * spec[2] / spec[3]) end
  if spec[5] >= 0 then b[2] = math.min(spec[7], b[2] + passed * spec[5] / spec[6]) end
  return b
end

-- A debt never exceeds the bucket: a caller waits for twice the bucket at most.
local function give(spec, requests, tokens)
  local b = bucket(spec)
  if requests ~= 0 and spec[2] >= 0 then
    b[1] = math.max(-spec[4], math.min(spec[4], b[1] + requests))
    b.changed = true
  end
  if tokens ~= 0 and spec[5] >= 0 then
    b[2] = math.max(-spec[7], math.min(spec[7], b[2] + tokens))
    b.changed = true
  end
end

local function fill_ms(level, limit, per, burst)
  if limit < 0 or level >= burst then return 0 end
  if limit == 0 then return MOST_TTL end
  return (burst - level) * per / limit / 1000
end

local function save_buckets()
  for name, b in pairs(buckets) do
    if b.changed then
      local s = b.spec
      local ttl = math.max(fill_ms(b[1], s[2], s[3], s[4]), fill_ms(b[2], s[5], s[6], s[7]))
      ttl = math.ceil(math.min(MOST_TTL, ttl)) + 1000
      redis.call('SET', PREFIX .. ':bucket:' .. name, struct.pack('<ddd', b[1], b[2], b[3]), 'PX', ttl)
    end
  end
end

-- Leases: what runs, by the time at which it is given up if nobody renews it.
local leases = {}

local function lease(name)
  local l = leases[name]
  if not l then
    local key = PREFIX .. ':lease:' .. name
    redis.call('ZREMRANGEBYSCORE', key, '-inf', NOW)
    local top = redis.call('ZREVRANGE', key, 0, 0, 'WITHSCORES')
    if top[2] and tonumber(top[2]) > NOW + LEASE then
      for _, member in ipairs(redis.call('ZRANGEBYSCORE', key, '(' .. string.format('%.0f', NOW + LEASE), '+inf')) do
        redis.call('ZADD', key, string.format('%.0f', NOW + LEASE), member)
      end
    end
    l = {redis.call('ZCARD', key), {}}
    leases[name] = l
  end
  return l
end

local function add_leases(name, members)
  local key = PREFIX .. ':lease:' .. name
  local score = string.format('%.0f', NOW + LEASE)
  for first = 1, #members, CHUNK do
    local words = {}
    for i = first, math.min(first + CHUNK - 1, #members) do
      words[#words + 1] = score
      words[#words + 1] = members[i]
    end
    redis.call('ZADD', key, unpack(words))
  end
  redis.call('PEXPIRE', key, math.ceil(LEASE / 1000) + 60000)
end

local function remove_leases(name, members)
  for first = 1, #members, CHUNK do
    redis.call('ZREM', PREFIX .. ':lease:' .. name, unpack(members, first, math.min(first + CHUNK - 1, #members)))
  end
end

-- Budgets: {tokens, cost} of a day and of a month.
local budgets = {}

local function budget(period, name)
  local id = period .. ':' .. name
  local b = budgets[id]
  if not b then
    local found = redis.call('HMGET', PREFIX .. ':budget:' .. id, 't', 'c')
    b = {tonumber(found[1] or '0'), tonumber(found[2] or '0'), 0, 0, period}
    budgets[id] = b
  end
  return b
end

-- Kept for long enough that a settlement which waited for Redis still finds it.
local function charge(id, period, tokens, cost)
  local key = PREFIX .. ':budget:' .. id
  if tokens ~= 0 then redis.call('HINCRBY', key, 't', string.format('%.0f', tokens)) end
  if cost ~= 0 then redis.call('HINCRBY', key, 'c', string.format('%.0f', cost)) end
  redis.call('EXPIRE', key, #period == 8 and 4 * 86400 or 66 * 86400)
end

local function save_budgets()
  for id, b in pairs(budgets) do
    if b[3] ~= 0 or b[4] ~= 0 then charge(id, b[5], b[3], b[4]) end
  end
end

-- Usage: a hash a day, a field a caller and model, eight counters in a text.
local function count(day, field, add)
  local key = PREFIX .. ':usage:' .. day
  local had = redis.call('HGET', key, field)
  local sums, i = {}, 1
  for number in string.gmatch(had or '', '%d+') do
    sums[i] = tonumber(number)
    i = i + 1
  end
  for n = 1, #add do sums[n] = string.format('%.0f', (sums[n] or 0) + add[n]) end
  redis.call('HSET', key, field, table.concat(sums, ' '))
  if not had then redis.call('EXPIRE', key, KEEP_USAGE) end
end

-- Take back admissions whose answer never arrived, if they happened: the marker says which of the batch were admitted.
local function undo(entry)
  local marker = redis.call('HGET', INSTANCE, 'a' .. (entry[1] % SLOTS))
  local number, day, bits = string.match(marker or '', '^(%d+) (%d+) (%d*)$')
  if tonumber(number) ~= entry[1] then return end
  for _, item in ipairs(entry[3]) do
    local index, tokens, cost, name = item[1], item[2], item[3], item[4]
    if string.sub(bits, index, index) == '1' then
      for i = 5, #item do
        local spec = entry[2][item[i]]
        give(spec, 1, tokens)
        if spec[8] >= 0 then remove_leases(spec[1], {name}) end
        if spec[9] >= 0 or spec[11] >= 0 then charge(day .. ':' .. spec[1], day, -tokens, -cost) end
        local month = string.sub(day, 1, 6)
        if spec[10] >= 0 or spec[12] >= 0 then charge(month .. ':' .. spec[1], month, -tokens, -cost) end
      end
    end
  end
end

-- Writes: {undo, renew, release, buckets, budgets, usage}.
local function write(w)
  for _, entry in ipairs(w[1]) do undo(entry) end
  for _, entry in ipairs(w[2]) do add_leases(entry[1], entry[2]) end
  for _, entry in ipairs(w[3]) do remove_leases(entry[1], entry[2]) end
  for _, entry in ipairs(w[4]) do give(entry[1], entry[2], entry[3]) end
  for _, entry in ipairs(w[5]) do charge(entry[1] .. ':' .. entry[2], entry[1], entry[3], entry[4]) end
  for _, entry in ipairs(w[6]) do count(entry[1], entry[2], entry[3]) end
end

local function until_midnight() return (DAYS + 1) * 86400000000 - NOW end

local function until_month() return (DAYS + days_of_month() - DAY_OF_MONTH + 1) * 86400000000 - NOW end

local function over(used, more, limit)
  return limit >= 0 and more > 0 and used + more > limit
end

-- The kind of the limit that refuses, and the microseconds to wait; -1: no waiting helps.
local function refusal(spec, b, tokens, cost)
  local name = spec[1]
  local kind, wait = 0, 0
  if spec[2] >= 0 and b[1] + EPSILON < 1 then
    kind, wait = 1, (spec[2] == 0 or spec[4] < 1) and -1 or math.ceil((1 - b[1]) * spec[3] / spec[2])
    if wait < 0 then return kind, wait end
  end
  if spec[5] >= 0 and b[2] + EPSILON < tokens then
    if spec[5] == 0 or spec[7] < tokens then return 2, -1 end
    local more = math.ceil((tokens - b[2]) * spec[6] / spec[5])
    if more > wait then kind, wait = 2, more end
  end
  if spec[8] >= 0 then
    local l = lease(name)
    if l[1] + #l[2] >= spec[8] then
      if spec[8] == 0 then return 3, -1 end
      if wait < 1000000 then kind, wait = 3, 1000000 end
    end
  end
  -- A request that counts no tokens is not let through a budget that is used up.
  local need = math.max(tokens, 1)
  if spec[9] >= 0 or spec[11] >= 0 then
    local day = budget(DAY, name)
    if over(day[1] + day[3], need, spec[9]) then kind, wait = 4, math.max(wait, until_midnight()) end
    if over(day[2] + day[4], cost, spec[11]) then kind, wait = 6, math.max(wait, until_midnight()) end
  end
  if spec[10] >= 0 or spec[12] >= 0 then
    local month = budget(MONTH_NAME, name)
    if over(month[1] + month[3], need, spec[10]) then kind, wait = 5, math.max(wait, until_month()) end
    if over(month[2] + month[4], cost, spec[12]) then kind, wait = 7, math.max(wait, until_month()) end
  end
  return kind, wait
end

local function take(spec, b, tokens, cost, id)
  if spec[2] >= 0 then b[1] = b[1] - 1 end
  if spec[5] >= 0 then b[2] = b[2] - tokens end
  if spec[2] >= 0 or spec[5] >= 0 then b.changed = true end
  if spec[8] >= 0 then
    local l = lease(spec[1])
    l[2][#l[2] + 1] = id
  end
  if spec[9] >= 0 or spec[11] >= 0 then
    local day = budget(DAY, spec[1])
    day[3], day[4] = day[3] + tokens, day[4] + cost
  end
  if spec[10] >= 0 or spec[12] >= 0 then
    local month = budget(MONTH_NAME, spec[1])
    month[3], month[4] = month[3] + tokens, month[4] + cost
  end
end

-- What the caller's headers say: of the bucket with the fewest left.
local function left(result, specs, item)
  local rl, rr, rw, tl, tr, tw = -1, 0, 0, -1, 0, 0
  for i = 4, #item do
    local s = specs[item[i]]
    local b = buckets[s[1]]
    if s[2] >= 0 and (rl < 0 or b[1] < rr) then rl, rr, rw = s[4], b[1], fill_ms(b[1], s[2], s[3], s[4]) end
    if s[5] >= 0 and (tl < 0 or b[2] < tr) then tl, tr, tw = s[7], b[2], fill_ms(b[2], s[5], s[6], s[7]) end
  end
  local n = #result
  result[n + 1], result[n + 2], result[n + 3] = rl, math.max(0, math.floor(rr + EPSILON)), math.ceil(rw)
  result[n + 4], result[n + 5], result[n + 6] = tl, math.max(0, math.floor(tr + EPSILON)), math.ceil(tw)
  return result
end

-- Items: {tokens, cost, lease, subject, subject, ...}; all subjects of an item, or none.
local function admit(specs, items)
  local results, bits = {}, {}
  for n, item in ipairs(items) do
    local tokens, cost = item[1], item[2]
    local at, kind, wait = 0, 0, 0
    for i = 4, #item do
      local spec = specs[item[i]]
      local k, w = refusal(spec, bucket(spec), tokens, cost)
      if k > 0 and wait >= 0 and (w < 0 or w > wait) then at, kind, wait = item[i], k, w end
    end
    if kind == 0 then
      for i = 4, #item do
        local spec = specs[item[i]]
        take(spec, bucket(spec), tokens, cost, item[3])
      end
      results[n], bits[n] = left({1}, specs, item), '1'
    else
      results[n], bits[n] = left({0, at, kind, wait}, specs, item), '0'
    end
  end
  for name, l in pairs(leases) do
    if #l[2] > 0 then add_leases(name, l[2]) end
  end
  save_budgets()
  return results, table.concat(bits)
end

local state = redis.call('HMGET', INSTANCE, 'w', 'f')
local written, fence = tonumber(state[1] or '0'), tonumber(state[2] or '0')
if FENCE > fence then fence = FENCE end
redis.call('HSET', INSTANCE, 'w', math.max(written, WRITES), 'f', fence)
redis.call('EXPIRE', INSTANCE, 604800)

if ARGV[4] ~= '' and WRITES > written then write(cmsgpack.unpack(ARGV[4])) end

local answer = {1, tonumber(DAY), {}, NOW}
if ARGV[6] ~= '' then
  if ADMITS <= fence then
    answer = {0}
  else
    local batch = cmsgpack.unpack(ARGV[6])
    local results, bits = admit(batch[1], batch[2])
    redis.call('HSET', INSTANCE, 'a' .. (ADMITS % SLOTS), ARGV[5] .. ' ' .. DAY .. ' ' .. bits)
    answer[3] = results
  end
end
save_buckets()
return cmsgpack.pack(answer)
