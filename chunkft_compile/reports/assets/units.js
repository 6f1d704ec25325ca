"use strict";
// Bytes and times for people, as planner/units.py writes them: one figure must not read differently on two pages.

const BYTE_UNITS = [
  ["B", 1n, 0],
  ["kB", 10n ** 3n, 1],
  ["MB", 10n ** 6n, 1],
  ["GB", 10n ** 9n, 3],
  ["TB", 10n ** 12n, 3],
];

function formatBytes(count) {
  const size = BigInt(Math.abs(count)),
    sign = count < 0 ? "-" : "";
  for (const [name, unit, digits] of BYTE_UNITS) {
    const scale = 10n ** BigInt(digits),
      scaled = size * scale;
    let ticks = scaled / unit;
    const rest = 2n * (scaled % unit);
    if (rest > unit || (rest === unit && ticks % 2n === 1n)) ticks += 1n;
    if (ticks >= 1000n * scale && name !== "TB") continue;
    const point = digits ? `.${String(ticks % scale).padStart(digits, "0")}` : "";
    return `${sign}${ticks / scale}${point} ${name}`;
  }
}

// toFixed, but a tie goes to the even digit, as in Python. A number that is a tie has few binary digits, so the product is exact.
function fixed(value, digits) {
  const scaled = value * 10 ** digits,
    below = Math.floor(scaled);
  const tie = Number.isInteger(value * 2 ** (digits + 1)) && scaled - below === 0.5;
  return tie ? ((below % 2 === 0 ? below : below + 1) / 10 ** digits).toFixed(digits) : value.toFixed(digits);
}

function formatTime(us) {
  if (us < 1000) return `${us} us`;
  if (us < 999500) return us < 99950 ? `${fixed(us / 1e3, 1)} ms` : `${fixed(us / 1e3, 0)} ms`;
  return `${fixed(us / 1e6, us < 9999500 ? 3 : us < 99995000 ? 2 : 1)} s`;
}

// The largest unit that `most` bytes have at least one of, for an axis.
function axisUnit(most) {
  const [name, unit] = [...BYTE_UNITS].reverse().find(([, unit]) => BigInt(most) >= unit) || BYTE_UNITS[0];
  return [Number(unit), name];
}

const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;
