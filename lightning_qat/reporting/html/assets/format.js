/* Numbers as the terminal and the txt files have them, and small helpers for the document. */

const DIGITS = 4;

/** A number with four significant digits, as Python's format "%.4g" writes it; ties go to the even digit. */
function formatNumber(value) {
  if (!Number.isFinite(value)) return Number.isNaN(value) ? "nan" : value > 0 ? "inf" : "-inf";
  if (value === 0) return Object.is(value, -0) ? "-0" : "0";
  const [digits, exponent] = roundedToEven(Math.abs(value));
  const sign = value < 0 ? "-" : "";
  const trimmed = digits.replace(/0+$/, "");
  if (exponent < -4 || exponent >= DIGITS) {
    const size = String(Math.abs(exponent)).padStart(2, "0");
    const fraction = trimmed.length > 1 ? `.${trimmed.slice(1)}` : "";
    return `${sign}${trimmed[0]}${fraction}e${exponent < 0 ? "-" : "+"}${size}`;
  }
  if (exponent < 0) return `${sign}0.${"0".repeat(-exponent - 1)}${trimmed}`;
  const fraction = digits.slice(exponent + 1).replace(/0+$/, "");
  return `${sign}${digits.slice(0, exponent + 1)}${fraction && `.${fraction}`}`;
}

/** The significant digits of a positive number, and the exponent of the first one. */
function roundedToEven(value) {
  const [mantissa, power] = value.toExponential(60).split("e");
  const all = mantissa.replace(".", "");
  const head = BigInt(all.slice(0, DIGITS));
  const rest = all.slice(DIGITS);
  const tie = /^50*$/.test(rest);
  const up = tie ? head % 2n === 1n : rest[0] >= "5";
  const digits = String(head + (up ? 1n : 0n));
  return digits.length > DIGITS ? [digits.slice(0, DIGITS), Number(power) + 1] : [digits, Number(power)];
}

/** A cell of a table as text: the same as in the terminal. */
function formatCell(value) {
  if (value === null || value === undefined) return "";
  if (typeof value === "boolean") return value ? "yes" : "no";
  return typeof value === "number" ? formatNumber(value) : String(value);
}

/** A cell of a column: shares are percent. */
function formatIn(column, value) {
  return column.share && typeof value === "number" ? formatShare(value) : formatCell(value);
}

function formatShare(value) {
  return Number.isFinite(value) ? `${formatNumber(Number((100 * value).toPrecision(3)))} %` : formatNumber(value);
}

/** Numbers that JSON does not have are words in it. */
function asNumber(value) {
  if (typeof value === "number") return value;
  return { nan: NaN, inf: Infinity, "-inf": -Infinity }[value];
}

/** Make an element. Text is text: nothing in it is read as HTML. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "text") element.textContent = value;
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== false && value !== null) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children);
  return element;
}

const byId = (id) => document.getElementById(id);

/** Tell something to people who see the page, and to those who hear it. */
function say(text) {
  byId("said").textContent = text;
  clearTimeout(say.timer);
  say.timer = setTimeout(() => { byId("said").textContent = ""; }, 2500);
}
