// What both programs share: bfloat16 products of row-major matrices, which MKL gives to the CPU's matrix units.
#define _GNU_SOURCE
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "mkl_cblas.h"

enum { H = 576, CONTEXT = 4 * H }; // SmolLM2-135M's width; its last hidden state and those of three layers
typedef uint16_t bf16;

static void *large(size_t bytes) {
    size_t page = 1 << 21;
    bytes = (bytes + page - 1) / page * page;
    void *memory = aligned_alloc(page, bytes);
    madvise(memory, bytes, MADV_HUGEPAGE);
    return memory;
}

static inline __m512 get(const bf16 *from) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

static inline void put(bf16 *to, __m512 x) {
    _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh(x));
}

static inline __m512 f32(const float *from) { return _mm512_loadu_ps(from); }

// 2^x to 1e-6
static inline __m512 power2(__m512 x) {
    x = _mm512_max_ps(x, _mm512_set1_ps(-126));
    __m512 whole = _mm512_roundscale_ps(x, 0), part = _mm512_sub_ps(x, whole);
    const float taylor[] = {1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1};
    __m512 y = _mm512_set1_ps(1.5403530e-4f);
    for (int i = 0; i < 6; i++) y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(taylor[i]));
    return _mm512_scalef_ps(y, whole);
}

#define LOG2_E 1.44269504f

static inline __m512 sigmoid(__m512 x) {
    __m512 power = _mm512_min_ps(_mm512_set1_ps(80), _mm512_mul_ps(x, _mm512_set1_ps(-LOG2_E)));
    return _mm512_div_ps(_mm512_set1_ps(1), _mm512_add_ps(_mm512_set1_ps(1), power2(power)));
}

static inline __m512 silu(__m512 x) { return _mm512_mul_ps(x, sigmoid(x)); }

// c[m, n] = a[m, k] b[n, k]^T, added to c if add is 1
static void multiply(long m, long n, long k, const bf16 *a, const bf16 *b, float add, float *c) {
    cblas_gemm_bf16bf16f32(CblasRowMajor, CblasNoTrans, CblasTrans, m, n, k, 1, a, k, b, k, add, c, n);
}
