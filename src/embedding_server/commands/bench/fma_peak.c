// SPDX-License-Identifier: MIT OR Apache-2.0
/* The most single-precision operations a second that N threads can do: independent chains of
 * fused multiply-adds in registers, without any memory. Prints GFLOP/s, the best of its runs.
 *
 *   cc -O3 -march=native -ffp-contract=fast -pthread fma_peak.c -o fma_peak && ./fma_peak N
 */
#define _POSIX_C_SOURCE 200809L
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

/* As wide as a register: the compiler would split a wider vector, and spill. The chains hide the
 * latency of an instruction, and must fit in the registers beside two constants. */
#if defined(__AVX512F__)
#define LANES 16
#define CHAINS 24
#elif defined(__AVX__)
#define LANES 8
#define CHAINS 12
#elif defined(__aarch64__)
#define LANES 4
#define CHAINS 24
#else
#define LANES 4
#define CHAINS 12
#endif

#define RUNS 5
#define SECONDS 0.04
#define MOST_THREADS 1024

typedef float vector __attribute__((vector_size(sizeof(float) * LANES)));

static long steps = 1000000;

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

static void *work(void *result) {
    vector sums[CHAINS], factor, term;
    for (int lane = 0; lane < LANES; lane++) {
        factor[lane] = 0.999f; /* towards 1: neither overflow nor denormals */
        term[lane] = 0.001f;
        for (int chain = 0; chain < CHAINS; chain++)
            sums[chain][lane] = (float)(chain + lane);
    }
    for (long step = 0; step < steps; step++)
#pragma GCC unroll 32
        for (int chain = 0; chain < CHAINS; chain++)
            sums[chain] = sums[chain] * factor + term;
    float total = 0;
    for (int chain = 0; chain < CHAINS; chain++)
        for (int lane = 0; lane < LANES; lane++)
            total += sums[chain][lane];
    *(float *)result = total; /* else nothing would have to be computed */
    return NULL;
}

static double run(int threads) {
    pthread_t ids[MOST_THREADS];
    float results[MOST_THREADS];
    double started = now();
    for (int i = 0; i < threads; i++)
        if (pthread_create(&ids[i], NULL, work, &results[i])) exit(1);
    for (int i = 0; i < threads; i++)
        pthread_join(ids[i], NULL);
    return now() - started;
}

int main(int argc, char **argv) {
    int threads = argc > 1 ? atoi(argv[1]) : 1;
    if (threads < 1 || threads > MOST_THREADS) return 2;
    double seconds = run(threads); /* also wakes the cores up */
    steps = (long)((double)steps * SECONDS / seconds);
    for (int i = 0; i < RUNS; i++) {
        double again = run(threads);
        if (i == 0 || again < seconds) seconds = again;
    }
    double operations = 2.0 * LANES * CHAINS * (double)steps * threads;
    printf("%.1f\n", operations / seconds / 1e9);
    return 0;
}
