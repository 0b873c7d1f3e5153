// Kernels that only tests need: parts of the owner's, seen from outside.

KERNEL(probe_chacha, 32, u32* out, u64 key0, u64 key1, u64 key2, u64 key3, u32 counter, u32 n0,
       u32 n1, u32 n2) {
  FOR_THREADS(t) {
    if (t == 0) {
      u32 words[16];
      chacha20(key_of(key0, key1, key2, key3), counter, n0, n1, n2, words);
      for (i32 i = 0; i < 16; ++i) out[i] = words[i];
    }
  }
}

// out uint32[256, 16]: the slots of (row . s) for one tile of rows.
KERNEL(probe_slots, 256, const i32* tile, const i32* secret, u32* out) {
  FOR_THREADS(t) {
    u32 v[16];
    slot_products(tile + t % LANES, secret, t / LANES, v);
    for (i32 i = 0; i < 16; ++i) out[(t / LANES * 16 + i) * LANES + t % LANES] = v[i];
  }
}

// out uint32[256, 32]: coefficients of (row . s) for the pair of tiles BLOCK_Y.
KERNEL(probe_mask, 512, const i32* matrix, const i32* secret, u32* out, i32 tiles) {
  SHARED u32 exchange[D * ROWS];
  FOR_THREADS(t) { first_half(matrix, tiles, secret, t, exchange); }
  FOR_THREADS(t) {
    u32 v[16];
    second_half(exchange, t, v);
    for (i32 i = 0; i < 16; ++i) out[(t / ROWS + 16 * i) * ROWS + t % ROWS] = v[i];
  }
}

// Threads pass a value on within one phase: a barrier is missing.
KERNEL(probe_race, 64, i32* out) {
  SHARED i32 cells[65];
  FOR_THREADS(t) {
    cells[t] = t;
    if (t == 0) cells[64] = 0;
  }
  FOR_THREADS(t) { cells[t] = cells[t + 1] + 1; }
  FOR_THREADS(t) { out[t] = cells[t]; }
}
