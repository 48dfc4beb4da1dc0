// Memory bandwidth as decoding sees it: each thread sums its share of an array that no cache holds.
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef struct {
  const uint64_t *data;
  size_t count;
  uint64_t sum;
} Share;

static void *sum_share(void *argument) {
  Share *share = argument;
  uint64_t sum[8] = {0};  // one cache line: the compiler keeps it in a vector register
  for (size_t i = 0; i + 8 <= share->count; i += 8)
    for (int j = 0; j < 8; j++) sum[j] += share->data[i + j];
  for (int j = 0; j < 8; j++) share->sum += sum[j];
  return NULL;
}

// Memory of that size with every page touched, or NULL.
uint64_t *make(size_t nbytes) {
  uint64_t *data = aligned_alloc(64, nbytes);
  if (data) memset(data, 1, nbytes);
  return data;
}

// Seconds that `threads` threads take to read it once.
double seconds(const uint64_t *data, size_t nbytes, int threads) {
  pthread_t thread[64];
  Share share[64];
  const size_t each = nbytes / sizeof(uint64_t) / threads / 8 * 8;
  struct timespec begun, ended;
  clock_gettime(CLOCK_MONOTONIC, &begun);
  for (int t = 0; t < threads; t++) {
    share[t] = (Share){data + t * each, each, 0};
    pthread_create(&thread[t], NULL, sum_share, &share[t]);
  }
  volatile uint64_t sum = 0;
  for (int t = 0; t < threads; t++) {
    pthread_join(thread[t], NULL);
    sum += share[t].sum;
  }
  clock_gettime(CLOCK_MONOTONIC, &ended);
  return (ended.tv_sec - begun.tv_sec) + 1e-9 * (ended.tv_nsec - begun.tv_nsec);
}
