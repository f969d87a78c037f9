/* Products y = x Wᵀ + b of float rows with quantized weights: what the files of this folder share.
 *
 * Weights lie in blocks of 16 rows (rows of W, so outputs) and groups of 32 columns; both are padded. Every instruction set reads the same
 * layout. In a block, for each group, with row r = 0..15, j = 0..3, b = 0..3:
 *
 *   int4  codes[64 j + 4 r + b] holds column 4 j + b in its low half and column 16 + 4 j + b in its high half     256 bytes
 *   int8  codes[64 j + 4 r + b], j = 0..7, holds column 4 j + b, plus 128                                         512 bytes
 *   bf16  halves[32 j + 2 r + b], j = 0..15, b = 0..1, holds column 2 j + b                                      1024 bytes
 *
 * int4: w = (code - 8) s + z. A group's `scales` hold s and z of the 16 rows, as u8 and i8 in units of the block's `base` (32 bytes, 4.5 bits
 * a weight), or "wide", as bfloat16 (64 bytes). int8: w = code * base[row]. A padded weight may be anything finite: its activation is 0.
 *
 * Activations are rounded to 8 bits with a scale for every 32 columns (int4 and int8), or to bfloat16. An output depends on its row of x and
 * on the instruction set only: not on the number of rows, threads, or on what else runs.
 */
#ifndef FEDTUNE_KERNELS_H
#define FEDTUNE_KERNELS_H

#include <stdint.h>

enum { BLOCK = 16, GROUP = 32, TILE = 8 };
enum { INT4 = 0, INT4_WIDE = 1, INT8 = 2, BF16 = 3, KINDS = 4 };
enum { PORTABLE = 0, AVX2 = 1, AVX512 = 2, SETS = 3 };

/* A packed linear. Sizes in bytes are those of the buffers; a pointer may be null if its size is 0. */
struct fedtune_weights {
    int64_t kind, n_in, n_out;
    const uint8_t *codes;
    int64_t codes_bytes;
    const uint8_t *scales; /* int4 only */
    int64_t scales_bytes;
    const float *base; /* int4: s and z of each block; int8: the scale of each row; bf16: none */
    int64_t base_bytes;
    const float *bias; /* [n_out] or null */
    int64_t bias_bytes;
};

/* 32 columns of a row of activations: x = code * scale. NaN or infinity among them makes the scale NaN. */
struct columns {
    float scale;
    float sum;     /* of the rounded x */
    int32_t total; /* of the codes */
    int32_t unused;
};

/* Rounded activations: int8_t [rows][groups * 32] with groups, or uint16_t bfloat16 [rows][groups * 32]. */
struct activations {
    void *codes;
    struct columns *groups;
};

/* One instruction set. `round_row` rounds a row of n_in columns; `tile` computes out[row][16], without bias, for one block and 1..TILE rows. */
typedef void round_row(const float *x, int64_t n_in, void *codes, struct columns *groups);
typedef void tile(const struct fedtune_weights *w, int64_t block, const void *codes, const struct columns *groups, int rows, float *out);

struct kernels {
    round_row *to_int8, *to_bf16;
    tile *tiles[KINDS];
};

extern const struct kernels fedtune_portable;
#if defined(__x86_64__)
extern const struct kernels fedtune_avx2, fedtune_avx512, fedtune_avx512_bf16;
#endif

static inline int64_t groups_of(int64_t n_in) { return (n_in + GROUP - 1) / GROUP; }

/* Group codes of these magnitudes count as zeros: their reciprocal would not be a float. */
#define TINY 1e-30f

/* Calls run(argument, first, end) for all of 0..count-1 in pieces of `step`, on this thread and up to threads - 1 others. */
void fedtune_pool_run(int threads, int64_t count, int64_t step, void (*run)(void *, int64_t, int64_t), void *argument);

#endif
