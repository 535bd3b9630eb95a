// The random numbers of dropout as a plain loop. Included by kernels/common-inl.h.
//
// Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011): a function of a
// counter and a key that passes BigCrush, so any element's number is at hand without those before it. The key is the
// seed. A counter gives four numbers, for columns 16 apart in a block of 64, so that lanes are columns side by side:
//     counter = {column / 64 * 16 + column % 16, slot, slot >> 32, projection}     number column / 16 % 4
void keep_mask(bf16* mask, const Dropout& dropout, uint32_t projection, int64_t slot, int first, int count) {
  constexpr int kLanes = 16, kBlock = 4 * kLanes;
  for (int block = first / kBlock * kBlock; block < first + count; block += kBlock) {
    uint16_t kept[kBlock];
    for (int lane = 0; lane < kLanes; lane++) {
      uint32_t a = uint32_t(block / 4 + lane), b = uint32_t(slot), c = uint32_t(uint64_t(slot) >> 32), d = projection;
      uint32_t key_a = uint32_t(dropout.seed), key_c = uint32_t(dropout.seed >> 32);
#pragma GCC unroll 10
      for (int round = 0; round < 10; round++) {
        const uint64_t product_a = uint64_t(a) * 0xd2511f53u, product_c = uint64_t(c) * 0xcd9e8d57u;
        a = uint32_t(product_c >> 32) ^ b ^ key_a;
        b = uint32_t(product_c);
        c = uint32_t(product_a >> 32) ^ d ^ key_c;
        d = uint32_t(product_a);
        key_a += 0x9e3779b9u;
        key_c += 0xbb67ae85u;
      }
      kept[lane] = a >= dropout.threshold ? 0xffff : 0;
      kept[kLanes + lane] = b >= dropout.threshold ? 0xffff : 0;
      kept[2 * kLanes + lane] = c >= dropout.threshold ? 0xffff : 0;
      kept[3 * kLanes + lane] = d >= dropout.threshold ? 0xffff : 0;
    }
    const int from = block < first ? first : block, to = block + kBlock < first + count ? block + kBlock : first + count;
    __builtin_memcpy(mask + (from - first), kept + (from - block), sizeof(bf16) * unsigned(to - from));
  }
}
