// How loops over elements get wide vector code: one function, compiled once per instruction set, chosen when the
// library is loaded. Vectorised exponentials come from the C library's libmvec.
#pragma once

// Inlined into each clone, so that its loops are compiled for the clone's instruction set.
#define SPARSEK_INLINE static inline __attribute__((always_inline))

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define SPARSEK_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#define SPARSEK_SIMD_MATH __attribute__((simd("notinbranch"), const))
#else
#define SPARSEK_CLONES
#define SPARSEK_SIMD_MATH
#endif
