// The shapes of lines between boxes: { left, right, top, bottom } in pixels.

/** Where a line meets the side of a box: as near to `wanted` as its corners allow. */
const between = (wanted, low, high) => Math.min(Math.max(wanted, low + 16), high - 16);
const centre = ({ left, right }) => (left + right) / 2;

/** A line between two boxes, and its middle. `shift` keeps two directions apart. */
export function join(a, b, shift) {
  const below = a.bottom <= b.top;
  if (below || b.bottom <= a.top) {
    const narrow = a.right - a.left < b.right - b.left ? a : b;
    const x1 = between(centre(narrow), a.left, a.right) + shift;
    const x2 = between(centre(narrow), b.left, b.right) + shift;
    const [y1, y2] = below ? [a.bottom, b.top] : [a.top, b.bottom];
    const bend = (y1 + y2) / 2;
    return { d: `M${x1} ${y1}C${x1} ${bend} ${x2} ${bend} ${x2} ${y2}`, middle: { x: (x1 + x2) / 2, y: bend } };
  }
  const [x1, x2] = a.right <= b.left ? [a.right, b.left] : [a.left, b.right];
  const y2 = (b.top + b.bottom) / 2;
  const y1 = between(y2, a.top, a.bottom);
  const bend = (x1 + x2) / 2;
  return { d: `M${x1} ${y1}C${bend} ${y1} ${bend} ${y2} ${x2} ${y2}`, middle: { x: bend, y: (y1 + y2) / 2 } };
}
