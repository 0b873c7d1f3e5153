// ChaCha20's block function, RFC 8439 section 2.3.

struct Key {
  u32 word[8];
};

// 32 bytes of key as four little-endian words.
DEVICE Key key_of(u64 a, u64 b, u64 c, u64 d) {
  const u64 words[4] = {a, b, c, d};
  Key key;
  UNROLL
  for (i32 i = 0; i < 4; ++i) {
    key.word[2 * i] = static_cast<u32>(words[i]);
    key.word[2 * i + 1] = static_cast<u32>(words[i] >> 32);
  }
  return key;
}

DEVICE u32 rotated(u32 x, i32 bits) { return (x << bits) | (x >> (32 - bits)); }

DEVICE void quarter_round(u32& a, u32& b, u32& c, u32& d) {
  a += b;
  d = rotated(d ^ a, 16);
  c += d;
  b = rotated(b ^ c, 12);
  a += b;
  d = rotated(d ^ a, 8);
  c += d;
  b = rotated(b ^ c, 7);
}

// Words 0..15 of block `counter` under the nonce (n0, n1, n2), all little endian.
DEVICE void chacha20(const Key& key, u32 counter, u32 n0, u32 n1, u32 n2, u32 (&out)[16]) {
  const u32 start[16] = {0x61707865u,  0x3320646eu,  0x79622d32u,  0x6b206574u,
                         key.word[0],  key.word[1],  key.word[2],  key.word[3],
                         key.word[4],  key.word[5],  key.word[6],  key.word[7],
                         counter,      n0,           n1,           n2};
  UNROLL
  for (i32 i = 0; i < 16; ++i) out[i] = start[i];
  for (i32 round = 0; round < 10; ++round) {
    UNROLL
    for (i32 i = 0; i < 4; ++i) quarter_round(out[i], out[4 + i], out[8 + i], out[12 + i]);
    UNROLL
    for (i32 i = 0; i < 4; ++i)
      quarter_round(out[i], out[4 + (i + 1) % 4], out[8 + (i + 2) % 4], out[12 + (i + 3) % 4]);
  }
  UNROLL
  for (i32 i = 0; i < 16; ++i) out[i] += start[i];
}
