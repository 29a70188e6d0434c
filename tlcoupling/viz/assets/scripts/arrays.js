/* Arrays in the page are 16-bit multiples of a scale. The lowest integer marks an undefined number. */

/** {shape, scale, data} -> {shape, at(...indices), row(...indices) of the last axis}. */
tlc.array = ({ shape, scale, data }) => {
  const bytes = Uint8Array.from(atob(data), (char) => char.charCodeAt(0));
  const steps = new DataView(bytes.buffer);
  const number = (offset) => {
    const step = steps.getInt16(2 * offset, true);
    return step === -32768 ? null : step * scale;
  };
  const offset = (indices) => indices.reduce((sum, index, axis) => sum * shape[axis] + index, 0);
  return {
    shape,
    at: (...indices) => number(offset(indices)),
    row: (...indices) => {
      const start = offset([...indices, 0]);
      return Array.from({ length: shape[shape.length - 1] }, (_, i) => number(start + i));
    },
  };
};

/** {shape, data} of square roots in 8 bits, numbers from 0 to 1 -> {shape, at(...indices)}. */
tlc.roots = ({ shape, data }) => {
  const steps = Uint8Array.from(atob(data), (char) => char.charCodeAt(0));
  const offset = (indices) => indices.reduce((sum, index, axis) => sum * shape[axis] + index, 0);
  return { shape, at: (...indices) => (steps[offset(indices)] / 255) ** 2 };
};

/** How many digits of an array's numbers mean something: at most four. */
tlc.digits = ({ scale }) => Math.max(1, Math.min(4, Math.ceil(-Math.log10(scale) - 0.3)));

/** Decompress text from base64 of zlib. */
tlc.inflate = (data) => {
  const bytes = Uint8Array.from(atob(data), (char) => char.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"))).text();
};
