/* Fused multi-head attention, forward and backward, on memory of this program's own, beside the same
 * written plainly.
 *
 *     cargo build --release
 *     cc -std=c11 -Iinclude examples/c/attention.c -Ltarget/release -lcrossfusion -lm -o attention
 *     LD_LIBRARY_PATH=target/release ./attention
 */
#include <crossfusion.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { HEADS = 2, D = 16, DIM = D / HEADS };

static void check(cf_status status, const char *what) {
  if (status == CF_OK) return;
  fprintf(stderr, "%s: %s\n", what, cf_last_error());
  exit(1);
}

/* A call that must be refused, in these words. */
static void refused(cf_status status, const char *words) {
  if (status == CF_USAGE && strstr(cf_last_error(), words)) return;
  fprintf(stderr, "status %d, \"%s\" instead of \"%s\"\n", status, cf_last_error(), words);
  exit(1);
}

/* A float32 matrix of this program, `stride` elements from row to row. */
typedef struct Matrix {
  float *data;
  int64_t shape[2], strides[2];
  DLTensor tensor;
} Matrix;

static void matrix(Matrix *m, int64_t rows, int64_t cols, int64_t stride, float scale) {
  static uint32_t state = 1;
  const size_t count = (size_t)(rows * stride);
  m->data = malloc(count * sizeof(float) + 1);
  for (size_t i = 0; i < count; i++) {
    state = state * 1664525u + 1013904223u;
    m->data[i] = scale * ((float)(state >> 8) / 8388608.0f - 1.0f);
  }
  m->shape[0] = rows, m->shape[1] = cols;
  m->strides[0] = stride, m->strides[1] = 1;
  m->tensor = (DLTensor){m->data, {1, 0}, 2, {2, 32, 1}, m->shape, m->strides, 0};
}

static float at(const Matrix *m, int64_t i, int64_t j) { return m->data[i * m->strides[0] + j]; }

/* One group of queries and keys: all that attention reads and writes. */
typedef struct Group {
  Matrix q, k, v, out, lse, dout, dq, dk, dv;
} Group;

static void group(Group *g, int64_t n, int64_t m, float scale) {
  matrix(&g->q, n, D, D + 3, scale); /* a part of a wider matrix */
  matrix(&g->k, m, D, D, scale);
  matrix(&g->v, m, D, D, 1);
  matrix(&g->out, n, D, D, 1);
  matrix(&g->lse, HEADS, n, n, 1);
  matrix(&g->dout, n, D, D, 1);
  matrix(&g->dq, n, D, D + 1, 1);
  matrix(&g->dk, m, D, D, 1);
  matrix(&g->dv, m, D, D, 1);
}

static cf_attention forward(const Group *g, cf_dropout dropout) {
  return (cf_attention){&g->q.tensor, &g->k.tensor, &g->v.tensor, HEADS, dropout, &g->out.tensor, &g->lse.tensor};
}

static cf_attention_grad backward(const Group *g, cf_dropout dropout) {
  return (cf_attention_grad){forward(g, dropout), &g->dout.tensor, &g->dq.tensor, &g->dk.tensor, &g->dv.tensor};
}

/* What rounding may do: a score's error is its share of the probability. */
static double tolerance;

static void near(const char *what, double got, double expected) {
  if (fabs(got - expected) <= tolerance * fmax(1, fabs(expected))) return;
  fprintf(stderr, "%s is %.8g, expected %.8g\n", what, got, expected);
  exit(1);
}

/* Attention and its gradients in double, head by head, and what the library wrote beside them. */
static void compare(const Group *g) {
  const int64_t n = g->q.shape[0], m = g->k.shape[0];
  const double scale = 1 / sqrt((double)DIM);
  double *p = calloc((size_t)(n * m) + 1, sizeof(double)), *ds = calloc((size_t)(n * m) + 1, sizeof(double));
  for (int h = 0; h < HEADS; h++) {
    double largest = 0;
    for (int64_t i = 0; i < n; i++)
      for (int64_t j = 0; j < m; j++) {
        double s = 0;
        for (int c = h * DIM; c < (h + 1) * DIM; c++) s += (double)at(&g->q, i, c) * at(&g->k, j, c);
        largest = fmax(largest, fabs(s * scale));
      }
    tolerance = 2e-5 + largest * 16 / 16777216; /* 16 roundings of 2^-24 */
    for (int64_t i = 0; i < n; i++) {
      double most = -INFINITY, sum = 0, delta = 0;
      for (int64_t j = 0; j < m; j++) {
        double s = 0;
        for (int c = h * DIM; c < (h + 1) * DIM; c++) s += (double)at(&g->q, i, c) * at(&g->k, j, c);
        p[i * m + j] = s * scale;
        most = fmax(most, p[i * m + j]);
      }
      for (int64_t j = 0; j < m; j++) sum += p[i * m + j] = exp(p[i * m + j] - most);
      if (m > 0) near("lse", at(&g->lse, h, i), most + log(sum));
      for (int64_t j = 0; j < m; j++) p[i * m + j] /= sum;
      for (int c = h * DIM; c < (h + 1) * DIM; c++) {
        double out = 0;
        for (int64_t j = 0; j < m; j++) out += p[i * m + j] * at(&g->v, j, c);
        near("out", at(&g->out, i, c), out);
        delta += out * at(&g->dout, i, c);
      }
      for (int64_t j = 0; j < m; j++) {
        double dp = 0;
        for (int c = h * DIM; c < (h + 1) * DIM; c++) dp += (double)at(&g->dout, i, c) * at(&g->v, j, c);
        ds[i * m + j] = p[i * m + j] * (dp - delta) * scale;
      }
      for (int c = h * DIM; c < (h + 1) * DIM; c++) {
        double dq = 0;
        for (int64_t j = 0; j < m; j++) dq += ds[i * m + j] * at(&g->k, j, c);
        near("dq", at(&g->dq, i, c), dq);
      }
    }
    for (int64_t j = 0; j < m; j++)
      for (int c = h * DIM; c < (h + 1) * DIM; c++) {
        double dk = 0, dv = 0;
        for (int64_t i = 0; i < n; i++) {
          dk += ds[i * m + j] * at(&g->q, i, c);
          dv += p[i * m + j] * at(&g->dout, i, c);
        }
        near("dk", at(&g->dk, j, c), dk);
        near("dv", at(&g->dv, j, c), dv);
      }
  }
  free(p);
  free(ds);
}

int main(void) {
  cf_context *context;
  check(cf_context_cpu(2, &context), "context");
  const cf_dropout none = {0};

  /* groups of any lengths are one call: one query, one key, no key, scores of hundreds */
  enum { GROUPS = 5 };
  static const struct { int64_t n, m; float scale; } sizes[GROUPS] = {{37, 200, 1}, {1, 5, 1}, {6, 1, 1}, {3, 0, 1}, {20, 30, 30}};
  Group groups[GROUPS];
  cf_attention calls[GROUPS];
  cf_attention_grad grads[GROUPS];
  for (int i = 0; i < GROUPS; i++) {
    group(&groups[i], sizes[i].n, sizes[i].m, sizes[i].scale);
    calls[i] = forward(&groups[i], none);
    grads[i] = backward(&groups[i], none);
  }
  check(cf_attention_forward(context, calls, GROUPS), "forward");
  check(cf_attention_backward(context, grads, GROUPS), "backward");
  for (int i = 0; i < GROUPS; i++) compare(&groups[i]);
  check(cf_attention_forward(context, NULL, 0), "no groups");

  /* dropout is drawn by its numbers: the same twice, another at another step */
  Group *g = &groups[0];
  const size_t bytes = (size_t)g->q.shape[0] * D * sizeof(float);
  float *first = malloc(bytes), *second = malloc(bytes);
  for (uint32_t step = 0; step < 2; step++) {
    cf_attention call = forward(g, (cf_dropout){.rate = 0.5, .seed = 7, .step = step});
    check(cf_attention_forward(context, &call, 1), "dropout");
    memcpy(step ? second : first, g->out.data, bytes);
    check(cf_attention_forward(context, &call, 1), "dropout again");
    if (memcmp(step ? second : first, g->out.data, bytes)) return fprintf(stderr, "another draw\n"), 1;
    /* seed and step may lie in memory, and are read when the op runs */
    const uint64_t draw[2] = {7, step};
    call = forward(g, (cf_dropout){.rate = 0.5, .draw = draw});
    check(cf_attention_forward(context, &call, 1), "dropout by numbers in memory");
    if (memcmp(step ? second : first, g->out.data, bytes)) return fprintf(stderr, "not those in memory\n"), 1;
  }
  if (memcmp(first, second, bytes) == 0) return fprintf(stderr, "the same draw at another step\n"), 1;

  /* what cannot be meant so is said by name */
  cf_attention call = forward(g, none);
  Matrix *k = &g->k;
  refused(cf_attention_forward(NULL, &call, 1), "context is null");
  refused(cf_attention_forward(context, NULL, 1), "problems is null");
  k->strides[0] = 0; /* expanded: every row is the first */
  refused(cf_attention_forward(context, &call, 1), "k has shape [200, 16] and strides [0, 1]: its rows overlap");
  k->strides[0] = 1, k->strides[1] = 200; /* transposed */
  refused(cf_attention_forward(context, &call, 1), "k has shape [200, 16] and strides [1, 200]: expected rows without gaps");
  k->strides[0] = D, k->strides[1] = 1;
  k->tensor.dtype.bits = 16;
  refused(cf_attention_forward(context, &call, 1), "k is of float16, expected float32");
  k->tensor.dtype.bits = 32;
  k->tensor.device.device_type = 2;
  refused(cf_attention_forward(context, &call, 1), "k is on GPU 0, the context on the CPU");
  k->tensor.device.device_type = 1;
  k->tensor.data = NULL;
  refused(cf_attention_forward(context, &call, 1), "k is null: there is no element of 4 bytes");
  k->tensor.byte_offset = 64;
  refused(cf_attention_forward(context, &call, 1), "k is null: there is no element of 4 bytes");
  k->tensor.data = k->data;
  k->tensor.byte_offset = 2;
  refused(cf_attention_forward(context, &call, 1), "where no float32 can be");
  k->tensor.byte_offset = UINT64_MAX;
  refused(cf_attention_forward(context, &call, 1), "k has byte_offset 18446744073709551615");
  k->tensor.byte_offset = 0;
  k->tensor.ndim = INT32_MAX;
  refused(cf_attention_forward(context, &call, 1), "k has 2147483647 dimensions, expected at most 64");
  k->tensor.ndim = 2;
  k->tensor.shape = NULL;
  refused(cf_attention_forward(context, &call, 1), "k's shape is null");
  k->tensor.shape = k->shape;
  k->shape[0] = 199;
  refused(cf_attention_forward(context, &call, 1), "v has shape [200, 16], expected [199, 16]");
  k->shape[0] = (INT64_C(1) << 62) + 5; /* times the columns it wraps to a few rows */
  refused(cf_attention_forward(context, &call, 1), "which is in no memory");
  k->shape[0] = -1;
  refused(cf_attention_forward(context, &call, 1), "k has shape [-1, 16]");
  k->shape[0] = 200;
  call.v = NULL;
  refused(cf_attention_forward(context, &call, 1), "v is null");
  call = forward(g, none);
  call.heads = 3;
  refused(cf_attention_forward(context, &call, 1), "16 columns in 3 heads");
  call = forward(g, (cf_dropout){.rate = 1.0});
  refused(cf_attention_forward(context, &call, 1), "dropout at a rate of 1");
  refused(cf_context_cpu(0, NULL), "out is null");

  for (int i = 0; i < GROUPS; i++) {
    Matrix *all[] = {&groups[i].q,    &groups[i].k,  &groups[i].v,  &groups[i].out, &groups[i].lse,
                     &groups[i].dout, &groups[i].dq, &groups[i].dk, &groups[i].dv};
    for (size_t j = 0; j < sizeof all / sizeof *all; j++) free(all[j]->data);
  }
  free(first);
  free(second);
  cf_context_free(context);
  printf("attention agrees\n");
  return 0;
}
