// Tile registers, eight of 16 rows x 64 bytes: the hardware's and a portable stand-in with the same interface, so that
// the AMX micro-kernel can be tested on any machine. Included inside the using file's anonymous namespace.
//
// Own wrappers instead of the compiler's intrinsics: those of GCC 12 lack the memory clobber (stores that fill a buffer
// about to be tile-loaded are deleted at -O3) and cannot take the tile number from a template.

#ifdef KTLIB_HARDWARE_TILES

struct HardwareTiles {
  static void configure() {
    // Palette 1; every tile 16 rows of 64 bytes. Reconfiguring zeroes the tiles, so ragged sizes are padded instead.
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    __asm__ volatile("ldtilecfg %0" ::"m"(config));
  }
  static void release() { __asm__ volatile("tilerelease"); }
  template <int Tile>
  static void zero() {
    __asm__ volatile("tilezero %%tmm%c0" ::"i"(Tile));
  }
  template <int Tile>
  static void load(const void* data, int64_t stride) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(data), "r"(stride), "i"(Tile) : "memory");
  }
  template <int Tile>
  static void store(void* data, int64_t stride) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(data), "r"(stride), "i"(Tile) : "memory");
  }
  // C[16][16] += A[16][32] . B[32][16], B in pairs.
  template <int C, int A, int B>
  static void dot() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
  }
};

#endif

struct EmulatedTiles {
  static unsigned char (*tiles())[16][64] {
    static thread_local unsigned char state[8][16][64];
    return state;
  }
  static void configure() {}
  static void release() {}
  template <int Tile>
  static void zero() {
    __builtin_memset(tiles()[Tile], 0, sizeof tiles()[Tile]);
  }
  template <int Tile>
  static void load(const void* data, int64_t stride) {
    for (int r = 0; r < 16; r++) __builtin_memcpy(tiles()[Tile][r], static_cast<const char*>(data) + r * stride, 64);
  }
  template <int Tile>
  static void store(void* data, int64_t stride) {
    for (int r = 0; r < 16; r++) __builtin_memcpy(static_cast<char*>(data) + r * stride, tiles()[Tile][r], 64);
  }
  template <int C, int A, int B>
  static void dot() {
    bf16 a[16][32], b[16][32];
    float c[16][16];
    __builtin_memcpy(a, tiles()[A], sizeof a);
    __builtin_memcpy(b, tiles()[B], sizeof b);
    __builtin_memcpy(c, tiles()[C], sizeof c);
    for (int r = 0; r < 16; r++)
      for (int p = 0; p < 16; p++)
        for (int j = 0; j < 16; j++)
          c[r][j] += to_float(a[r][2 * p]) * to_float(b[p][2 * j]) + to_float(a[r][2 * p + 1]) * to_float(b[p][2 * j + 1]);
    __builtin_memcpy(tiles()[C], c, sizeof c);
  }
};
