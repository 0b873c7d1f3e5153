// Arithmetic mod q = 2^28 - 2559 in registers; `backends/he/ring.py` states the bounds.
//
// Q, Q_INVERSE, FOLD, SECRET_FACTOR and the tables FORWARD and INVERSE, pairs (w, floor(w*2^32/q)) of
// twiddles in bit-reversed order, are written by `launch.py`.

// x mod q for x in [0, 2q), and for x in (-q, 0) kept as x + 2^32: no branch, no secret timing.
DEVICE u32 reduced(u32 x) { return smaller(x, x - Q); }
DEVICE u32 made_positive(u32 x) { return smaller(x, x + Q); }

// x*w mod q in [0, q) for any x (Shoup).
DEVICE u32 times_constant(u32 x, u32 w, u32 w_shoup) {
  return reduced(x * w - high_product(x, w_shoup) * Q);
}

// acc * 2^-32 mod q in [0, q), for |acc >> 32| < q/2 (Montgomery): the difference of the high halves
// is within +-q.
DEVICE u32 montgomery(i64 acc) {
  const i32 factor = static_cast<i32>(static_cast<u32>(acc) * Q_INVERSE);
  const i32 taken = high_product(factor, static_cast<i32>(Q));
  return made_positive(static_cast<u32>(static_cast<i32>(acc >> 32) - taken));
}

// Gentleman-Sande: (a + b, (a - b)*w) mod q.
DEVICE void inverse_butterfly(u32& a, u32& b, const u32* twiddle) {
  const u32 difference = a - b + Q;
  a = reduced(a + b);
  b = times_constant(difference, twiddle[0], twiddle[1]);
}

// Cooley-Tukey: (a + b*w, a - b*w) mod q.
DEVICE void forward_butterfly(u32& a, u32& b, const u32* twiddle) {
  const u32 product = times_constant(b, twiddle[0], twiddle[1]);
  b = made_positive(a - product);
  a = reduced(a + product);
}

// Four stages of the inverse NTT on sixteen values, `first` the first stage's first twiddle.
DEVICE void four_stages(u32 (&v)[16], i32 first) {
  UNROLL
  for (i32 stage = 0; stage < 4; ++stage) {
    UNROLL
    for (i32 pair = 0; pair < 8; ++pair) {
      const i32 group = pair >> stage;
      const i32 low = (group << (stage + 1)) + (pair & ((1 << stage) - 1));
      inverse_butterfly(v[low], v[low + (1 << stage)], INVERSE + 2 * ((first >> stage) + group));
    }
  }
}
