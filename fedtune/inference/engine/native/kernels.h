/* Products y = x Wᵀ + b of float rows with quantized weights: what the files of this folder share.
 *
 * Weights lie in blocks of 16 rows (rows of W, so outputs) and groups of 32 columns; both are padded. Every instruction set reads the same
 * layout. In a block, for each group, with row r = 0..15, j = 0..3, b = 0..3:
 *
 *   int4  codes[64 j + 4 r + b] holds column 4 j + b in its low half and column 16 + 4 j + b in its high half     256 bytes
 *   int8  codes[64 j + 4 r + b], j = 0..7, holds column 4 j + b, plus 128                                         512 bytes
 *   bf16  halves[32 j + 2 r + b], j = 0..15, b = 0..1, holds column 2 j + b                                      1024 bytes
 *
 * fp32 is plain: float codes[n_out][n_in]. int4: w = (code - 8) s + z. A group's `scales` hold s and z of the 16 rows, as u8 and i8 in units
 * of the block's `base` (32 bytes, 4.5 bits a weight), or "wide", as bfloat16 (64 bytes). int8: w = code * base[row]. A padded weight may be
 * anything finite: its activation is 0.
 *
 * Activations are rounded to 8 bits with a scale for every 32 columns (int4 and int8), or to bfloat16 (bf16). fp32 does not round them. An
 * output depends only on its row of x and on the instruction set: not on the number of rows or threads, nor on what else runs.
 */
#ifndef FEDTUNE_KERNELS_H
#define FEDTUNE_KERNELS_H

#include <stdint.h>
#include <string.h>

#define EXPORTED __attribute__((visibility("default")))

enum { BLOCK = 16, GROUP = 32, TILE = 64, TILE_BLOCKS = 2 };
enum { INT4 = 0, INT4_WIDE = 1, INT8 = 2, BF16 = 3, FP32 = 4, KINDS = 5 };
/* Attention: tokens in a tile, rows in a call, and the most query heads for a key head and channels of a head. */
enum { TOKENS = 32, ROWS_AT_ONCE = 32, MOST_SHARED = 128, MOST_WIDTH = 512 };
enum { QKV = 0, O = 1, GATE_UP = 2, DOWN = 3, LINEARS = 4 }; /* the linears of a layer */
enum { FINE = 0, BAD_SIZE = 1, NO_MEMORY = 2, NO_SUCH_SET = 3 };
enum { FLOATS = 0, BFLOAT16S = 1, FLOAT16S = 2 }; /* of an embedding table */
enum { PORTABLE = 0, AVX2 = 1, AVXVNNI = 2, AVX512 = 3, DOTPROD = 4, I8MM = 5, SETS = 6 };

/* A packed linear. Sizes in bytes are those of the buffers; a pointer may be null if its size is 0. */
struct fedtune_weights {
    int64_t kind, n_in, n_out;
    const uint8_t *codes;
    int64_t codes_bytes;
    const uint8_t *scales; /* int4 only */
    int64_t scales_bytes;
    const float *base; /* int4: the units of s and of z of each block; int8: the scale of each row; bf16 and fp32: none */
    int64_t base_bytes;
    const float *bias; /* [n_out] or null */
    int64_t bias_bytes;
};

/* 32 columns of a row of activations: x = code * scale. NaN or infinity among them makes the scale NaN. */
struct columns {
    float scale;
    float sum;     /* of the rounded x */
    int32_t minus_8;   /* -8 times the sum of the codes, because an int4 weight's code is stored plus 8 */
    int32_t minus_128; /* likewise for int8, stored plus 128 */
};

/* Rounded activations: int8_t [rows][groups * 32] with groups, or uint16_t bfloat16 or float [rows][groups * 32]. */
struct activations {
    void *codes;
    struct columns *groups;
};

/* Functions of an instruction set. `round_row` rounds a row of n_in columns; `tile` computes out[row * stride + 0 .. 16 * blocks - 1], without
 * bias, for 1..TILE_BLOCKS blocks from `block` and 1..TILE rows; it may prefetch the weights of blocks from `next`, if that is not 0. */
typedef void round_row(const float *x, int64_t n_in, void *codes, struct columns *groups);
typedef void tile(const struct fedtune_weights *w, int64_t block, int blocks, int64_t next, const void *codes, const struct columns *groups,
                  int rows, float *out, int64_t stride);

/* Quantized keys and values of one head: x = code * scale + low, with scale and low in float16. Keys have one pair of them for each group of
 * tokens and channel, values for each token and `values_together` channels. A byte holds the codes of 8 / bits tokens: the first
 * group * bits / 8 tokens of a group are in the low bits, the next ones in the bits above. */
struct codes {
    const uint8_t *keys, *values;                                         /* [groups, group * bits / 8, width] */
    const uint16_t *key_lows, *key_scales, *value_lows, *value_scales;    /* [groups, width] and [groups, group, parts] */
    int64_t bits, group, values_together;
};

/* The attention of some query rows of one sequence to one head of keys and values. */
struct attention {
    const void *keys, *values; /* of this head: slot i begins at entry i * token_stride */
    int64_t token_stride;
    int64_t first;         /* the token in slot 0 */
    const int32_t *blocks; /* null, or token t is in slot blocks[t / block] * block + t % block */
    int64_t block;
    int64_t sinks, ring; /* with a ring, token t is in slot sinks + (t - sinks) % ring unless it is one of the sinks */
    const float *places; /* with a ring, rotations for places 0 .. sinks + window - 1; its keys are stored unrotated */
    const struct codes *codes; /* null, or the codes that a row at p sees of tokens below group * ((p + 1 - residual) / group) */
    int64_t residual;
    int halves; /* bfloat16 entries instead of float32 */
    int shared; /* query heads that share the head, side by side */
    int64_t width, length, window; /* channels of a head; position of row 0; newest tokens that a row sees, with itself, or 0 for all */
    float cap;                     /* soft cap of the scores, or 0 */
    int64_t chain;         /* rows that follow each other; each later one is a fork (see struct fedtune_span) */
    const int64_t *forks;  /* of the later rows: the row that each follows */
    const float *q;                /* rotated and scaled */
    float *out;
    int64_t q_stride, out_stride; /* floats from row to row */
};

/* See rows.h. */
struct operations {
    void (*norm)(const float *x, const float *weight, float *out, int64_t n, float eps);
    void (*add)(float *to, const float *x, int64_t n);
    void (*activate)(const float *gate, const float *up, float *out, int64_t n, int gelu);
    void (*cap)(float *x, int64_t n, float most);
    void (*rotate)(float *x, const float *turns, int64_t pairs, float factor);
    void (*halve)(const float *x, int64_t n, uint16_t *out);
    void (*attend)(const struct attention *a, int64_t row, int rows); /* 1..ROWS_AT_ONCE rows */
    void (*shrink)(const float *x, int64_t x_stride, int64_t rows, const float *a, int64_t n_in, int64_t ranks, float *out, int64_t out_stride);
    void (*expand)(const float *x, int64_t x_stride, int64_t rows, const float *b, int64_t b_stride, int64_t ranks, float *y, int64_t y_stride,
                   int64_t n);
    void (*two_best)(const float *x, int64_t n, float sharpness, int64_t *tokens, float *chances);
};

struct kernels {
    round_row *to_int8, *to_bf16, *copy;
    tile *tiles[KINDS];
    const struct operations *operations;
};

extern const struct kernels fedtune_portable;
#if defined(__x86_64__)
#ifdef __has_include
#if __has_include(<avxvnniintrin.h>) /* older compilers do not know AVX-VNNI */
#define HAS_AVXVNNI
#endif
#endif
extern const struct kernels fedtune_avx2, fedtune_avxvnni, fedtune_avx512, fedtune_avx512_bf16;
#elif defined(__aarch64__) && defined(__linux__)
#if defined(__clang__) ? __clang_major__ >= 16 : __GNUC__ >= 10 /* older compilers do not know the instructions by function */
#define HAS_NEON
extern const struct kernels fedtune_dotprod, fedtune_i8mm;
#endif
#endif

/* A float's nearest bfloat16, ties to even; NaN stays NaN. */
static inline uint16_t bf16_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* Where token `at` of a sequence lies: see struct attention for the arguments. */
static inline int64_t slot_of(int64_t at, int64_t first, const int32_t *blocks, int64_t block, int64_t sinks, int64_t ring) {
    if (blocks)
        return (int64_t)blocks[at / block] * block + at % block;
    return ring && at >= sinks ? sinks + (at - sinks) % ring : at - first;
}

static inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

static inline int64_t groups_of(int64_t n_in) { return (n_in + GROUP - 1) / GROUP; }

/* Activations of a group become zeros if all are smaller than this: 127 / (the largest) could overflow. */
#define TINY 1e-30f

/* A layer. A norm is null where the layer has none. Rows of qkv's q and k are in pairs of channels that rotate together. */
struct fedtune_layer {
    struct fedtune_weights qkv, o, gate_up, down;
    const float *norm, *q_norm, *k_norm, *o_norm, *mlp_norm, *down_norm;
    int64_t window; /* newest tokens that a row sees, with itself; 0: all */
    int64_t turns;  /* index of its table of rotations in the pass */
};

/* A decoder as engine/decoder.py describes it. */
struct fedtune_decoder {
    int64_t hidden, heads, kv_heads, head_dim, intermediate, layers;
    int64_t whole_norms; /* q_norm and k_norm are over all heads at once */
    int64_t gelu;        /* gelu_tanh instead of silu */
    float eps, query_scale, attention_cap, logit_cap; /* query_scale includes head_dim^-0.5; a cap of 0 is none */
    const struct fedtune_layer *layer;
    const float *norm; /* before the head */
    struct fedtune_weights head;
};

/* A LoRA adapter's part in a linear of a layer: y[first .. first + n - 1] += (x aᵀ) b. */
struct fedtune_lora_piece {
    int64_t linear; /* QKV .. DOWN */
    int64_t rank, n_in, first, n;
    const float *a, *b; /* [rank, n_in], [rank, n] */
};

/* A LoRA adapter: pieces starts[i] .. starts[i + 1] - 1 belong to layer i. */
struct fedtune_lora {
    int64_t layers, count; /* of the pieces */
    const int64_t *starts; /* [layers + 1] */
    const struct fedtune_lora_piece *pieces;
};

/* One sequence of a pass, and where its keys and values are in each layer. A buffer holds `entries` numbers; those of slot i and head h
 * begin at i * token_stride + h * head_stride. struct attention says which slot a token is in. */
struct fedtune_span {
    int64_t rows, length; /* tokens of this pass, and tokens before it */
    void *const *keys, *const *values; /* [layers] */
    int64_t entries, token_stride, head_stride;
    int64_t halves; /* they are bfloat16 instead of float32 */
    const int32_t *blocks;
    int64_t block_count, block;
    int64_t first; /* the token in slot 0, if there are codes */
    int64_t window, sinks, ring; /* of a ring: a row sees the sinks and `window` newest tokens, and less if the layer's own window says so */
    void *const *codes; /* null, or [layers][6]: the buffers of struct codes, in its order */
    int64_t bits, group, values_together, residual, groups; /* groups: groups of tokens that the buffers of codes hold */
    const struct fedtune_lora *lora; /* or null */
    int64_t fork_count;   /* the last rows are forks: other tokens for places of the rows before */
    const int64_t *forks; /* [fork_count]: the row that each follows. A fork sees the rows up to that one, and itself */
};

/* Layers first .. last - 1 change hidden states [rows, hidden] in place. If `logits` is not null, the logits of the rows in `kept` follow. */
struct fedtune_pass {
    int64_t rows, first, last;
    float *hidden;
    int64_t span_count;
    const struct fedtune_span *spans;
    int64_t turns_count;
    const float *const *turns; /* tables [rows, head_dim / 2, 2]: cosine and sine of each row's position, times a factor */
    int64_t place_count;
    const float *const *places; /* likewise for places 0 .. place_count - 1, if a span has a ring */
    int64_t kept_count;
    const int64_t *kept;
    float *logits; /* [kept_count, vocabulary] */
};

/* Draft tokens after a pass: the most likely token, then the most likely one after it, and so on. */
struct fedtune_draft {
    const void *embedding; /* [vocabulary or more, hidden] */
    int64_t kind;          /* of the table: FLOATS .. FLOAT16S */
    int64_t vocabulary;    /* only the first tokens of the head are drafted */
    int64_t most;          /* tokens to draft */
    float embed_scale;
    float least;     /* stop once the product of the tokens' chances, each times `trust` but at most 1, is below this */
    float trust;
    float sharpness; /* chances are the softmax of the logits times this */
    float penalty;   /* divides the logits of tokens seen if they are positive, and multiplies them if not */
    uint8_t *seen;   /* [vocabulary] or null; drafted tokens are added */
    int64_t *tokens; /* [most][2]: the two most likely tokens, the likelier first */
    float *chances;  /* [most][2] */
    int64_t made;    /* result: tokens drafted */
};

int fedtune_pass_run(const struct fedtune_decoder *decoder, const struct fedtune_pass *pass, const struct kernels *kernels, int threads);

/* The pass must have one span without ring, codes and forks, and keep its last row only. Keys, values and the tables of rotations must have
 * room for draft->most - 1 more tokens. */
int fedtune_draft_run(const struct fedtune_decoder *decoder, const struct fedtune_pass *pass, struct fedtune_draft *draft,
                      const struct kernels *kernels, int threads);

/* y = x Wᵀ + b, where rows of x lie x_stride floats apart. `space` holds space_for(w, rows) bytes, aligned to 64; sizes are checked before. */
void fedtune_product(const struct fedtune_weights *w, const struct kernels *kernels, int threads, int64_t rows, const float *x, int64_t x_stride,
                     float *y, void *space);
int64_t fedtune_space_for(const struct fedtune_weights *w, int64_t rows); /* or -1: too many */

/* The same in two steps: round each of the `rows` rows into the space, then multiply them. */
void fedtune_round(const struct fedtune_weights *w, const struct kernels *kernels, int64_t rows, int64_t row, const float *x, void *space);
void fedtune_product_of_rounded(const struct fedtune_weights *w, const struct kernels *kernels, int threads, int64_t rows, float *y, void *space);
int fedtune_weights_fit(const struct fedtune_weights *w);
int fedtune_is_product(int64_t bytes, int64_t a, int64_t b, int64_t c, int64_t d); /* whether bytes = a b c d, without overflow */
const struct kernels *fedtune_kernels_of(int set); /* or null: this CPU does not have it */

/* Calls run(argument, first, end) for all of 0..count-1 in pieces of `step`, on this thread and up to threads - 1 others. */
void fedtune_pool_run(int threads, int64_t count, int64_t step, void (*run)(void *, int64_t, int64_t), void *argument);

#endif
