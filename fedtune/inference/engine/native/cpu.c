/* The instruction sets of this CPU. */
#include <stdatomic.h>
#include <stddef.h>
#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

#include "kernels.h"

enum { AVX512_BF16 = SETS }; /* AVX512 with bfloat16 products; Python sees it as AVX512 */

/* The sets of an x86-64 CPU, as bits 1 << set. Arguments are CPUID's registers (ecx of leaf 1, ebx and ecx of leaf 7, eax of leaf 7.1; 0 if
 * the CPU has no such leaf), and the state components that the system saves, from xgetbv. Tests call this and the next function. */
EXPORTED int fedtune_sets_of_x86(uint32_t c1, uint32_t b7, uint32_t c7, uint32_t a71, uint64_t saved) {
    const uint32_t fma_saved_avx = 1u << 12 | 1u << 27 | 1u << 28, f_dq_bw_vl = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;
    int sets = 1 << PORTABLE;
    if ((c1 & fma_saved_avx) != fma_saved_avx || (saved & 6) != 6 || !(b7 & 1u << 5))
        return sets;
    sets |= 1 << AVX2 | (a71 & 1u << 4 ? 1 << AVXVNNI : 0);
    if ((b7 & f_dq_bw_vl) == f_dq_bw_vl && c7 & 1u << 11 && (saved & 0xe6) == 0xe6) /* bit 11: VNNI */
        sets |= 1 << AVX512 | (a71 & 1u << 5 ? 1 << AVX512_BF16 : 0);
    return sets;
}

/* Likewise of an aarch64 CPU, by Linux's HWCAP and HWCAP2. */
EXPORTED int fedtune_sets_of_arm(uint64_t capabilities, uint64_t more) {
    const int dot = capabilities >> 20 & 1, products = dot && more >> 13 & 1; /* HWCAP_ASIMDDP, HWCAP2_I8MM */
    return 1 << PORTABLE | dot << DOTPROD | products << I8MM;
}

static int sets_of_cpu(void) {
#if defined(__x86_64__)
    uint32_t a = 0, b = 0, c = 0, d, c1, low = 0, high = 0, a71 = 0, highest = __get_cpuid_max(0, NULL);
    if (highest < 7)
        return 1 << PORTABLE;
    __cpuid(1, a, b, c1, d);
    if (c1 & 1u << 27) /* xgetbv exists */
        __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    __cpuid_count(7, 0, a, b, c, d);
    const uint32_t b7 = b, c7 = c;
    if (a)
        __cpuid_count(7, 1, a71, b, c, d);
    return fedtune_sets_of_x86(c1, b7, c7, a71, (uint64_t)high << 32 | low);
#elif defined(__aarch64__) && defined(__linux__)
    return fedtune_sets_of_arm(getauxval(AT_HWCAP), getauxval(AT_HWCAP2));
#else
    return 1 << PORTABLE;
#endif
}

const struct kernels *fedtune_kernels_of(int set) {
    static const struct kernels *const all[SETS + 1] = {
        [PORTABLE] = &fedtune_portable,
#if defined(__x86_64__)
        [AVX2] = &fedtune_avx2, [AVX512] = &fedtune_avx512, [AVX512_BF16] = &fedtune_avx512_bf16,
#endif
#ifdef HAS_AVXVNNI
        [AVXVNNI] = &fedtune_avxvnni,
#endif
#ifdef HAS_NEON
        [DOTPROD] = &fedtune_dotprod, [I8MM] = &fedtune_i8mm,
#endif
    };
    static atomic_int known = 0;
    int sets = atomic_load(&known);
    if (!sets)
        atomic_store(&known, sets = sets_of_cpu());
    if (set == AVX512 && sets & 1 << AVX512_BF16)
        return all[AVX512_BF16];
    return set >= 0 && set < SETS && sets & 1 << set ? all[set] : NULL;
}
