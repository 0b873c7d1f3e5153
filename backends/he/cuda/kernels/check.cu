// Sums behind the check of answers: `backends/he/integrity.py` says what is compared and why.
//
// A thread block takes two tokens and the eight rows of a request: a thread holds their 16 sums,
// and every word of V or U = V*M that it loads serves both tokens. Sums are in f64, of exact
// products; their order is not the CPU's, so they agree with it to 2^-45 of their parts, some 10^-8
// of what an honest answer's noise is. Cost, counted: 8 products an input and an output of every
// token.

const i32 CHECK_ROWS = 8;
const i32 CHECK_TOKENS = 2;
const i32 CHECK_THREADS = 256;
const i32 CHECK_SUMS = CHECK_ROWS * CHECK_TOKENS;

// Adds value[n] * rows[row, k] to the sums of one thread; `width` is the length of a row.
DEVICE void add_products(const f32* matrix, const i32* rows, i32 width, i32 k,
                         const f64 (&value)[CHECK_TOKENS], f64 (&sum)[CHECK_SUMS]) {
  UNROLL
  for (i32 row = 0; row < CHECK_ROWS; ++row) {
    const f64 factor = widened(matrix[static_cast<i64>(rows[row]) * width + k]);
    UNROLL
    for (i32 n = 0; n < CHECK_TOKENS; ++n) sum[n * CHECK_ROWS + row] += value[n] * factor;
  }
}

// A thread's part of the sums of all threads, laid out by `sums`: 16 threads for each of 16 sums.
DEVICE f64 part_of_sum(const f64* sums, i32 t) {
  f64 part = 0;
  for (i32 i = t % 16; i < CHECK_THREADS; i += 16) part += sums[t / 16 * CHECK_THREADS + i];
  return part;
}

// The sum number t of a thread block, from its parts.
DEVICE f64 whole_sum(const f64* parts, i32 t) {
  f64 total = 0;
  for (i32 i = 0; i < 16; ++i) total += parts[16 * t + i];
  return total;
}

// expected f64[tokens, 8] = ratio * U*m for rows i32[8] of U f32[pool, inputs]; the message m is
// round(x * in_scale * factor), as it is encrypted. Grid: x over pairs of tokens.
KERNEL(expectations, 256, const f32* x, const f32* in_scale, const f64* factor,
       const f32* projected, const i32* rows, f64* expected, i32 tokens, i32 inputs, f64 ratio) {
  SHARED f64 sums[CHECK_SUMS * CHECK_THREADS];
  SHARED f64 parts[CHECK_THREADS];
  FOR_THREADS(t) {
    f64 sum[CHECK_SUMS] = {};
    for (i32 k = t; k < inputs; k += CHECK_THREADS) {
      const f64 scale = widened(in_scale[k]);
      f64 value[CHECK_TOKENS];
      UNROLL
      for (i32 n = 0; n < CHECK_TOKENS; ++n) {
        // The missing token of a last pair repeats the one before.
        const i64 token = min(BLOCK_X * CHECK_TOKENS + n, tokens - 1);
        value[n] = nearest(widened(x[token * inputs + k]) * scale * factor[token]);
      }
      add_products(projected, rows, inputs, k, value, sum);
    }
    UNROLL
    for (i32 i = 0; i < CHECK_SUMS; ++i) sums[i * CHECK_THREADS + t] = sum[i];
  }
  FOR_THREADS(t) { parts[t] = part_of_sum(sums, t); }
  FOR_THREADS(t) {
    const i32 token = BLOCK_X * CHECK_TOKENS + t / CHECK_ROWS;
    if (t < CHECK_SUMS && token < tokens)
      expected[static_cast<i64>(token) * CHECK_ROWS + t % CHECK_ROWS] = whole_sum(parts, t) * ratio;
  }
}

// found f64[tokens, 8] = V*y - expected for rows i32[8] of V f32[pool, outputs]; y f32[tokens,
// outputs], centred results, is then scaled in place to what is delivered. Grid as above.
KERNEL(differences, 256, f32* y, const f32* pool, const i32* rows, const f64* expected,
       const f64* inverse, const f32* out_scale, f64* found, i32 tokens, i32 outputs) {
  SHARED f64 sums[CHECK_SUMS * CHECK_THREADS];
  SHARED f64 parts[CHECK_THREADS];
  FOR_THREADS(t) {
    f64 sum[CHECK_SUMS] = {};
    for (i32 j = t; j < outputs; j += CHECK_THREADS) {
      const f64 scale = widened(out_scale[j]);
      f64 value[CHECK_TOKENS] = {};
      UNROLL
      for (i32 n = 0; n < CHECK_TOKENS; ++n) {
        const i64 token = BLOCK_X * CHECK_TOKENS + n;
        if (token < tokens) {
          f32* result = y + token * outputs + j;
          value[n] = widened(*result);
          *result = narrowed(value[n] * inverse[token] * scale);
        }
      }
      add_products(pool, rows, outputs, j, value, sum);
    }
    UNROLL
    for (i32 i = 0; i < CHECK_SUMS; ++i) sums[i * CHECK_THREADS + t] = sum[i];
  }
  FOR_THREADS(t) { parts[t] = part_of_sum(sums, t); }
  FOR_THREADS(t) {
    const i32 token = BLOCK_X * CHECK_TOKENS + t / CHECK_ROWS;
    if (t < CHECK_SUMS && token < tokens) {
      const i64 at = static_cast<i64>(token) * CHECK_ROWS + t % CHECK_ROWS;
      found[at] = whole_sum(parts, t) - expected[at];
    }
  }
}
