/* Arrays in the page are whole multiples of a step, in the bytes behind the page's JSON. */

{
  /** Bytes from base 85, five characters for four bytes, most significant first (RFC 1924 without &, < and >). */
  const bytesOf = (text) => {
    const digits = new Uint8Array(128);
    [..."0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz!#$%,()*+-;.=/?@^_`{|}~"].forEach((digit, i) => (digits[digit.charCodeAt(0)] = i));
    const groups = Math.ceil(text.length / 5);
    const view = new DataView(new ArrayBuffer(4 * groups));
    for (let group = 0; group < groups; group += 1) {
      let number = 0;
      for (let i = 5 * group; i < 5 * group + 5; i += 1) number = 85 * number + (i < text.length ? digits[text.charCodeAt(i)] : 84);
      view.setUint32(4 * group, number);
    }
    return new Uint8Array(view.buffer, 0, 4 * groups - (5 * groups - text.length));
  };

  const inflated = (text) => new Response(new Blob([bytesOf(text)]).stream().pipeThrough(new DecompressionStream("deflate")));

  /** Decompress text from base 85 of zlib. */
  tlc.inflate = (text) => inflated(text).text();

  let arrays; // the bytes of all of them

  /** Decompress the page's data: return its JSON, and keep the bytes of its arrays. */
  tlc.unpack = async (text) => {
    const content = await inflated(text).arrayBuffer();
    const length = new DataView(content).getUint32(0, true);
    arrays = new Uint8Array(content, 4 + length);
    return JSON.parse(new TextDecoder().decode(new Uint8Array(content, 4, length)));
  };

  /** [start, length] -> the bytes there. */
  tlc.bytes = ([start, length]) => arrays.subarray(start, start + length);

  const offset = (shape, indices) => indices.reduce((sum, index, axis) => sum * shape[axis] + index, 0);

  /**
   * {shape, scale, data: [start, length]} of 16-bit integers, all low bytes before all high bytes -> {shape, at(...indices),
   * part(...indices)}: a number, null where it is not defined; and the numbers of the last axes, NaN where they are not.
   */
  tlc.array = ({ shape, scale, data: [start, length] }) => {
    const high = start + length / 2;
    const numbers = Float64Array.from({ length: length / 2 }, (_, i) => {
      const step = ((arrays[high + i] << 24) >> 16) | arrays[start + i];
      return step === -32768 ? NaN : step * scale;
    });
    return {
      shape,
      at: (...indices) => {
        const number = numbers[offset(shape, indices)];
        return Number.isNaN(number) ? null : number;
      },
      part: (...indices) => {
        const size = shape.slice(indices.length).reduce((product, side) => product * side, 1);
        const first = size * offset(shape, indices);
        return numbers.subarray(first, first + size);
      },
    };
  };

  /** {shape, data} of square roots in 8 bits, numbers from 0 to 1 -> {shape, at(...indices), part(...indices) of the last axis}. */
  tlc.roots = ({ shape, data: [start, length] }) => {
    const numbers = Float64Array.from({ length }, (_, i) => (arrays[start + i] / 255) ** 2);
    const side = shape[shape.length - 1];
    return {
      shape,
      at: (...indices) => numbers[offset(shape, indices)],
      part: (...indices) => {
        const first = side * offset(shape, indices);
        return numbers.subarray(first, first + side);
      },
    };
  };

  /** Whether an array's numbers are coarser than the four digits that the page shows. */
  tlc.isCoarse = ({ scale }) => scale > 1e-4;

  /** How exact an array's numbers are, in words. */
  tlc.precision = ({ scale }) => {
    const digits = Math.max(0, Math.ceil(-Math.log10(scale / 2)));
    return `±\u00a0${(Math.ceil((scale / 2) * 10 ** digits) / 10 ** digits).toFixed(digits)}`;
  };

  /** How many digits of an array's numbers mean something: at most four. */
  tlc.digits = ({ scale }) => Math.max(1, Math.min(4, Math.ceil(-Math.log10(scale) - 0.3)));
}
