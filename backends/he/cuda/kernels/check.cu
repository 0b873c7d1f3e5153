// Does an answer fit its request? `backends/he/integrity.py` says what is compared and why.
//
// A thread block takes four tokens and all eight sign vectors: a thread holds their 32 sums, and
// every word of V and U = V*M that it loads serves the four tokens. Sums wrap at 2^32, which p
// divides, so their order does not matter. Cost, counted: 8 products an input and an output of
// every token.

const i32 CHECK_ROWS = 8;
const i32 CHECK_TOKENS = 4;
const i32 CHECK_THREADS = 256;

// A request's value of one token and input, mod 2^32, from its digit planes int8[LIMBS, tokens, K].
DEVICE u32 joined_digits(const i8* planes, i64 plane_size, i64 at) {
  u32 value = 0;
  UNROLL
  for (i32 limb = 0; limb < LIMBS; ++limb)
    value += static_cast<u32>(planes[limb * plane_size + at]) << (8 * limb);
  return value;
}

// found int32[tokens, 8] = (V*Y'*2^dropped_bits - U*B) mod p, centred; *wrong is set where one is
// over `tolerance` in size. signs V int8[8, outputs], projected U int32[8, inputs]; grid: x over
// groups of four tokens.
KERNEL(differences, 256, const i8* planes, const i32* projected, const u16* answer, const i8* signs,
       i32* found, i32* wrong, i32 tokens, i32 inputs, i32 outputs, i32 dropped_bits,
       i32 tolerance) {
  SHARED u32 sums[CHECK_TOKENS * CHECK_ROWS * CHECK_THREADS];
  SHARED u32 parts[CHECK_THREADS];
  const i64 plane_size = static_cast<i64>(tokens) * inputs;
  FOR_THREADS(t) {
    u32 sum[CHECK_TOKENS][CHECK_ROWS] = {};
    for (i32 k = t; k < inputs; k += CHECK_THREADS) {
      u32 value[CHECK_TOKENS];
      UNROLL
      for (i32 n = 0; n < CHECK_TOKENS; ++n) {
        // A group's missing tokens repeat the last one.
        const i64 token = min(BLOCK_X * CHECK_TOKENS + n, tokens - 1);
        value[n] = joined_digits(planes, plane_size, token * inputs + k);
      }
      UNROLL
      for (i32 row = 0; row < CHECK_ROWS; ++row) {
        const u32 factor = static_cast<u32>(projected[static_cast<i64>(row) * inputs + k]);
        UNROLL
        for (i32 n = 0; n < CHECK_TOKENS; ++n) sum[n][row] -= value[n] * factor;
      }
    }
    for (i32 j = t; j < outputs; j += CHECK_THREADS) {
      u32 value[CHECK_TOKENS];
      UNROLL
      for (i32 n = 0; n < CHECK_TOKENS; ++n) {
        const i64 token = min(BLOCK_X * CHECK_TOKENS + n, tokens - 1);
        value[n] = static_cast<u32>(answer[token * outputs + j]) << dropped_bits;
      }
      UNROLL
      for (i32 row = 0; row < CHECK_ROWS; ++row) {
        const u32 sign = static_cast<u32>(signs[static_cast<i64>(row) * outputs + j]);
        UNROLL
        for (i32 n = 0; n < CHECK_TOKENS; ++n) sum[n][row] += value[n] * sign;
      }
    }
    UNROLL
    for (i32 n = 0; n < CHECK_TOKENS; ++n) {
      UNROLL
      for (i32 row = 0; row < CHECK_ROWS; ++row)
        sums[(n * CHECK_ROWS + row) * CHECK_THREADS + t] = sum[n][row];
    }
  }
  FOR_THREADS(t) {
    // Eight threads for each of the 32 sums.
    u32 part = 0;
    for (i32 i = t % 8; i < CHECK_THREADS; i += 8) part += sums[t / 8 * CHECK_THREADS + i];
    parts[t] = part;
  }
  FOR_THREADS(t) {
    const i32 token = BLOCK_X * CHECK_TOKENS + t / CHECK_ROWS;
    if (t < CHECK_TOKENS * CHECK_ROWS && token < tokens) {
      u32 total = 0;
      for (i32 i = 0; i < 8; ++i) total += parts[8 * t + i];
      const i32 centred = static_cast<i32>(total << (32 - 8 * LIMBS)) >> (32 - 8 * LIMBS);
      found[static_cast<i64>(token) * CHECK_ROWS + t % CHECK_ROWS] = centred;
      if (centred > tolerance || -centred > tolerance) *wrong = 1;
    }
  }
}
