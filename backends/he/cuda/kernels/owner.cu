// The owner's ring work: secrets, token scales, encryption, decryption. RANK and LIMBS are
// compile-time constants; `backends/he/mlwe_owner.py` defines what is computed, bit for bit.
//
// Public matrices are int32[tiles, RANK, 256, 16], rows innermost. A thread block takes ROWS rows
// (two tiles); thread t works on row t % ROWS, so that a warp is one part of 32 rows: every
// global access of a warp is whole sectors, and what differs between parts (twiddles, secrets) is
// the same for all its threads. Part t / ROWS first owns slots 16*part .. 16*part+15: the sum over
// RANK, one Montgomery reduction each, four butterfly stages, all in registers. One exchange
// through shared memory, and it owns coefficients (tokens) part, part+16, ...: four stages with
// twiddles known to the compiler, and the epilogue.
//
// Randomness: ChaCha20 blocks, counter and nonce (SECRETS, block, k) or (ERRORS, block, 0).
//   secret   coefficient n of polynomial k: 64-bit word n of the stream, (word * 3 >> 64) - 1;
//            each of -1, 0, 1 has probability 1/3 up to 2^-64
//   error    of row k and token t: entry i = 16*(t % 16) + t / 16 of the row's 20 blocks (counter
//            20*k ...), which are 256 words followed by 256 bytes: popcount(word i) +
//            popcount(byte i) - 20
//
// Cost, counted and not measured: a row and block take RANK*256 wide products, 256 Montgomery
// reductions and 1024 butterflies, and encryption 20 ChaCha20 blocks; the bytes are RANK KiB of
// the matrix, shared through the caches by all blocks of a request, 4 + LIMBS a value encrypted,
// 2 + 4 a value decrypted.

const i32 D = 256;
const i32 LANES = 16;
const i32 ROWS = 32;
const i32 PARTS = 16;
const u32 ERROR_MEAN = 20;
enum Stream { SECRETS, ERRORS };

// Four words loaded at once.
struct alignas(16) Four {
  i32 at[4];
};

// Sixteen slots of (row . s): row points at slot 0 of a row, secret at slot 0 of int32[RANK, 256].
DEVICE void slot_products(const i32* row, const i32* secret, i32 part, u32 (&v)[16]) {
  UNROLL
  for (i32 i = 0; i < 16; i += 4) {
    const i32 slot = 16 * part + i;
    i64 sums[4] = {};
    UNROLL
    for (i32 k = 0; k < RANK; ++k) {
      const Four words = *reinterpret_cast<const Four*>(secret + k * D + slot);
      UNROLL
      for (i32 n = 0; n < 4; ++n)
        sums[n] += static_cast<i64>(row[(k * D + slot + n) * LANES]) * words.at[n];
    }
    UNROLL
    for (i32 n = 0; n < 4; ++n) v[i + n] = montgomery(sums[n]);
  }
}

// First half of the mask of one row: its slots, four stages, laid out for the other half.
DEVICE void first_half(const i32* matrix, i32 tiles, const i32* secret, i32 t, u32* exchange) {
  // Opaque: kept from one block to the next, twiddles and addresses would fill the registers.
  const i32 same = opaque(t), row = same % ROWS, part = same / ROWS;
  // A last odd tile is computed twice; the second result is dropped.
  const i64 tile = min(BLOCK_Y * (ROWS / LANES) + row / LANES, tiles - 1);
  u32 v[16];
  slot_products(matrix + tile * (RANK * D * LANES) + row % LANES, secret, part, v);
  four_stages(v, 8 * (16 + part));
  UNROLL
  for (i32 i = 0; i < 16; ++i) exchange[(16 * part + i) * ROWS + row] = v[i];
}

// Second half: v[i] = coefficient part + 16*i of (row . s), in [0, q).
DEVICE void second_half(const u32* exchange, i32 t, u32 (&v)[16]) {
  const i32 row = t % ROWS, part = t / ROWS;
  UNROLL
  for (i32 i = 0; i < 16; ++i) v[i] = exchange[(part + 16 * i) * ROWS + row];
  four_stages(v, 8);
}

// u * p/q, rounded to a multiple of 2^unused, as `backends/he/epilogue.py` says: FOLD / 2^48 is
// 2559/q, and high_product is the product's upper 32 bits.
DEVICE u32 rounded_to_p(u32 u, i32 unused) {
  const i32 bits = 28 - 8 * LIMBS + unused;
  return (u + (high_product(u, FOLD) >> 16) + (1u << (bits - 1))) >> bits << unused;
}

// Digits of mask + error + message, a signed byte each, the lowest `unused` bits zero; `value` is
// the scaled message.
DEVICE u32 sealed_digits(u32 mask, f64 value, u32 error, i32 unused) {
  // Adding 1.5 * 2^52 leaves round(value) in the low bits.
  const u32 message = static_cast<u32>(bits_of(value + 6755399441055744.0));
  const u32 added = made_positive(message + error - ERROR_MEAN);
  const u32 b = rounded_to_p(reduced(mask + added), unused);
  return (b + 0x808080u) ^ 0x808080u;
}

// secrets: centred int32[blocks, RANK, 256] = NTT(s) * 2^32 / 256, grid (blocks, RANK).
KERNEL(draw_secrets, 128, i32* secrets, u64 key0, u64 key1, u64 key2, u64 key3) {
  SHARED u32 values[D];
  FOR_THREADS(t) {
    if (t < D / 8) {
      u32 words[16];
      chacha20(key_of(key0, key1, key2, key3), t, SECRETS, BLOCK_X, BLOCK_Y, words);
      UNROLL
      for (i32 n = 0; n < 8; ++n) {
        const u64 word = words[2 * n] | static_cast<u64>(words[2 * n + 1]) << 32;
        const u32 ternary = static_cast<u32>(high_product(word, static_cast<u64>(3))) - 1;
        values[8 * t + n] = made_positive(ternary);
      }
    }
  }
  for (i32 stage = 7; stage >= 0; --stage) {
    FOR_THREADS(t) {
      const i32 group = t >> stage;
      const i32 low = (group << (stage + 1)) + (t & ((1 << stage) - 1));
      const i32 twiddle = (128 >> stage) + group;
      forward_butterfly(values[low], values[low + (1 << stage)], FORWARD + 2 * twiddle);
    }
  }
  FOR_THREADS(t) {
    for (i32 n = t; n < D; n += 128) {
      const u32 v = times_constant(values[n], SECRET_FACTOR, SECRET_FACTOR_SHOUP);
      const i32 centred = static_cast<i32>(v > Q / 2 ? v - Q : v);
      secrets[(static_cast<i64>(BLOCK_X) * RANK + BLOCK_Y) * D + n] = centred;
    }
  }
}

// For token BLOCK_X of x float32[T, inputs]: norms = ||x * in_scale||, and with `amplitude`
// the factor q/p * alpha it is encrypted with and 1/alpha. *bad is set when a norm is not finite.
KERNEL(token_scales, 256, const f32* x, const f32* in_scale, f64* norms, f64* factor, f64* inverse,
       i32* bad, i32 inputs, f64 amplitude, f64 q_over_p) {
  SHARED f64 sums[256];
  const i64 at = static_cast<i64>(BLOCK_X) * inputs;
  FOR_THREADS(t) {
    f64 sum = 0;
    for (i32 k = t; k < inputs; k += 256) {
      const f64 v = widened(x[at + k]) * widened(in_scale[k]);
      sum += v * v;
    }
    sums[t] = sum;
  }
  for (i32 half = 128; half > 0; half /= 2) {
    FOR_THREADS(t) {
      if (t < half) sums[t] += sums[t + half];
    }
  }
  FOR_THREADS(t) {
    if (t == 0) {
      const f64 norm = square_root(sums[0]);
      // Up to 20 significant bits, so that the order of the sum does not matter.
      const u64 low = (1ull << 33) - 1;
      const f64 up = double_of((bits_of(norm) + low) & ~low);
      const bool zero = norm < 1e-200;
      norms[BLOCK_X] = norm;
      factor[BLOCK_X] = (zero ? 1.0 : amplitude / up) * q_over_p;
      inverse[BLOCK_X] = zero ? 0.0 : up / amplitude;
      if ((bits_of(norm) >> 52 & 0x7ff) == 0x7ff) *bad = 1;
    }
  }
}

// planes int8[LIMBS, tokens, inputs] of x float32[tokens, inputs], rounded to multiples of
// 2^unused. Grid: x over groups of `blocks_each` blocks, y over pairs of tiles.
KERNEL(encrypt, 512, const i32* matrix, const i32* secrets, const f32* x, const f32* in_scale,
       const f64* factor, i8* planes, i32 tokens, i32 inputs, i32 tiles, i32 blocks_each,
       i32 unused, u64 key0, u64 key1, u64 key2, u64 key3) {
  SHARED u32 exchange[D * ROWS];
  SHARED u32 bytes[D / 4 * ROWS];
  const i64 plane_size = static_cast<i64>(tokens) * inputs;
  const i32 first = BLOCK_X * blocks_each;
  for (i32 block = first; block < first + blocks_each && block * D < tokens; ++block) {
    const i32 count = min(D, tokens - block * D);
    FOR_THREADS(t) {
      first_half(matrix, tiles, secrets + static_cast<i64>(block) * RANK * D, t, exchange);
      const i32 row = t % ROWS, part = t / ROWS;
      // The bytes of a row are four blocks: the first four warps make one each for all sixteen.
      if (part < 4) {
        u32 words[16];
        const u32 counter = 20u * (BLOCK_Y * ROWS + row) + 16u + part;
        chacha20(key_of(key0, key1, key2, key3), counter, ERRORS, block, 0, words);
        UNROLL
        for (i32 n = 0; n < 16; ++n) bytes[(16 * part + n) * ROWS + row] = words[n];
      }
    }
    FOR_THREADS(t) {
      const i32 row = t % ROWS, part = t / ROWS, k = BLOCK_Y * ROWS + row;
      if (part < count && k < inputs) {
        u32 words[16], mask[16];
        u32 errors[4] = {};  // four to a word: registers are scarce
        chacha20(key_of(key0, key1, key2, key3), 20u * k + part, ERRORS, block, 0, words);
        UNROLL
        for (i32 i = 0; i < 16; ++i) {
          const u32 byte = bytes[(4 * part + i / 4) * ROWS + row] >> (8 * (i % 4)) & 0xff;
          errors[i / 4] |= (bits_set(words[i]) + bits_set(byte)) << (8 * (i % 4));
        }
        second_half(exchange, t, mask);
        const f64 scale = widened(in_scale[k]);
        const f64* factors = factor + block * D + part;
        i64 at = static_cast<i64>(block * D + part) * inputs + k;
        UNROLL
        for (i32 i = 0; i < 16; ++i) {
          if (part + 16 * i < count) {
            const f64 value = widened(x[at]) * scale * factors[16 * i];
            const u32 error = errors[i / 4] >> (8 * (i % 4)) & 0xff;
            const u32 digits = sealed_digits(mask[i], value, error, unused);
            i8* plane = planes + at;
            UNROLL
            for (i32 limb = 0; limb < LIMBS; ++limb) {
              *plane = static_cast<i8>(digits >> (8 * limb));
              plane += plane_size;
            }
          }
          at += 16 * inputs;
        }
      }
    }
  }
}

// out float32[tokens, outputs] from answer uint16[tokens, outputs], for the rows from `first_row`
// on of a slab of `tiles` tiles of the hint. `half_unit` is what rounding half up added to multiples
// of 2^unused, on average. Grid as for `encrypt`.
KERNEL(decrypt, 512, const i32* hint, const i32* secrets, const u16* answer, const f64* inverse,
       const f32* out_scale, f32* out, i32 tokens, i32 outputs, i32 first_row, i32 tiles,
       i32 blocks_each, i32 dropped_bits, i32 half_unit) {
  SHARED u32 exchange[D * ROWS];
  const i32 first = BLOCK_X * blocks_each;
  for (i32 block = first; block < first + blocks_each && block * D < tokens; ++block) {
    const i32 count = min(D, tokens - block * D);
    FOR_THREADS(t) {
      first_half(hint, tiles, secrets + static_cast<i64>(block) * RANK * D, t, exchange);
    }
    FOR_THREADS(t) {
      const i32 in_slab = BLOCK_Y * ROWS + t % ROWS, part = t / ROWS, j = first_row + in_slab;
      if (part < count && in_slab < tiles * LANES && j < outputs) {
        u32 mask[16];
        second_half(exchange, t, mask);
        const f64 scale = widened(out_scale[j]);
        const f64* inverses = inverse + block * D + part;
        i64 at = static_cast<i64>(block * D + part) * outputs + j;
        UNROLL
        for (i32 i = 0; i < 16; ++i) {
          if (part + 16 * i < count) {
            const u32 high = static_cast<u32>(answer[at]) << dropped_bits;
            const u32 y = high - rounded_to_p(mask[i], 0) - static_cast<u32>(half_unit);
            // Shift out the bits above p, and back with the sign: y mod p, centred.
            const i32 centred = static_cast<i32>(y << (32 - 8 * LIMBS)) >> (32 - 8 * LIMBS);
            out[at] = narrowed(static_cast<f64>(centred) * inverses[16 * i] * scale);
          }
          at += 16 * outputs;
        }
      }
    }
  }
}
