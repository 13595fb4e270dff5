-- SPDX-License-Identifier: MIT OR Apache-2.0
-- The load of `compare`: sends the bodies of a file in turn, waits for the last answer, and
-- prints one line of JSON.
--
--   wrk -t1 -c64 -d120s --timeout 120s -s wrk.lua URL -- FILE SECONDS
--
-- FILE holds one body after another, each behind its length in bytes and a newline. After
-- SECONDS no request is sent any more, but those under way are waited for (up to -d): work/time
-- is then exact for a server that takes seconds for an answer, too. One thread only.

local ffi = require("ffi")
ffi.cdef [[
  typedef struct { long seconds; long nanoseconds; } moment;
  int clock_gettime(int clock, moment *now);
  int kill(int process, int signal);
  int getpid(void);
]]
local MONOTONIC, INTERRUPT = 1, 2
local moment = ffi.new("moment")

local function now()
  ffi.C.clock_gettime(MONOTONIC, moment)
  return tonumber(moment.seconds) + tonumber(moment.nanoseconds) / 1e9
end

local requests, load_seconds = {}, 0

function init(args)
  wrk.headers["Content-Type"] = "application/json"
  local file = assert(io.open(args[1], "rb"))
  while true do
    local length = file:read("*l")
    if not length then break end
    requests[#requests + 1] = wrk.format("POST", nil, nil, file:read(tonumber(length)))
  end
  file:close()
  load_seconds = tonumber(args[2])
end

-- Globals, so that done() can read them from the thread.
calls, sent, answers, refused, bytes, first, last = 0, 0, 0, 0, 0, 0, 0
refusal = ""

function request()
  calls = calls + 1
  if calls == 1 then return requests[1] end -- wrk looks at the first one itself
  if sent == 0 then first = now() end
  if now() - first >= load_seconds then return "" end -- nothing is sent; the connection rests
  sent = sent + 1
  return requests[(sent - 1) % #requests + 1]
end

function response(status, headers, body)
  answers, last, bytes = answers + 1, now(), bytes + #body
  if status ~= 200 then
    refused = refused + 1
    refusal = status .. ": " .. body:sub(1, 200)
  end
  if answers == sent and last - first >= load_seconds then
    ffi.C.kill(ffi.C.getpid(), INTERRUPT) -- wrk's own way to end before -d
  end
end

local load_thread

function setup(thread) load_thread = thread end

local function quoted(text)
  return '"' .. text:gsub('[%c"\\]', function(c) return ("\\u%04x"):format(c:byte()) end) .. '"'
end

function done(summary, latency, _)
  local get = function(name) return load_thread:get(name) end
  local errors = summary.errors
  io.write(("\n{%s}\n"):format(table.concat({
    ('"answers": %d'):format(get("answers")),
    ('"seconds": %.6f'):format(get("last") - get("first")),
    ('"refused": %d'):format(get("refused")),
    ('"refusal": %s'):format(quoted(get("refusal"))),
    ('"unanswered": %d'):format(get("sent") - get("answers")),
    ('"socket_errors": %d'):format(errors.connect + errors.read + errors.write + errors.timeout),
    ('"bytes": %d'):format(get("bytes")),
    ('"p50_ms": %.3f'):format(latency:percentile(50) / 1000),
    ('"p95_ms": %.3f'):format(latency:percentile(95) / 1000),
    ('"p99_ms": %.3f'):format(latency:percentile(99) / 1000),
  }, ", ")))
end
