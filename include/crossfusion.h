/* CrossFusion's kernels and models in C: docs/embedding.md. c/src makes this file: do not edit.
 *
 * Tensors are DLPack's, of float32 or bfloat16 (float64 on a CPU). An operand's first dimension is its
 * rows, all others together its columns, without gaps; one dimension is one row. An op runs in the type
 * of its first operand; statistics, log-sum-exps and the gradients of parameters are float32 (float64).
 *
 * Where an argument is said to be written, nobody else may look at it during the call; on a GPU, until
 * the stream has got there. Pointers must be valid, or null where that is allowed. */

#ifndef CROSSFUSION_H
#define CROSSFUSION_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#ifndef DLPACK_DLPACK_H_ /* DLPack's own header, where it comes first, has these */
#define DLPACK_DLPACK_H_
typedef struct DLDevice {
  int32_t device_type; /* 1: CPU, 2: CUDA */
  int32_t device_id;
} DLDevice;
typedef struct DLDataType {
  uint8_t code; /* 2: float, 4: bfloat */
  uint8_t bits;
  uint16_t lanes;
} DLDataType;
typedef struct DLTensor {
  void *data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t *shape;
  int64_t *strides; /* in elements; null: no gaps */
  uint64_t byte_offset;
} DLTensor;
#endif


// Grows whenever a struct or a function changes its meaning.
#define CF_ABI_VERSION 1

// How a call ended.
typedef enum cf_status {
  CF_OK = 0,
  // The call cannot be meant so: a shape, a type, a setting.
  CF_USAGE = 1,
  // A file cannot be read or written, or is not what was expected.
  CF_FILE = 2,
  // The device refused or failed: no GPU, no memory, a kernel's error.
  CF_DEVICE = 3,
  // A defect of this library; please report it.
  CF_BUG = 4,
} cf_status;

// How the tokens of a convolution lie.
typedef enum cf_grid {
  // A square, row by row: `extent` is its side.
  CF_SQUARE = 0,
  // A sequence: `extent` is its length.
  CF_SEQUENCE = 1,
} cf_grid;

// The survival losses of time bins.
typedef enum cf_loss_kind {
  // Negative log-likelihood of discrete hazards.
  CF_NLL_SURV = 0,
  // Cross-entropy of the survival curve at the label's bin.
  CF_CE_SURV = 1,
} cf_loss_kind;

// How tied events count.
typedef enum cf_ties {
  CF_BRESLOW = 0,
  // As R's `coxph` does.
  CF_EFRON = 1,
} cf_ties;

// Which model, as the command line names them.
typedef enum cf_model_name {
  CF_CROSSFUSION = 0,
  CF_CROSSFUSION_CONCAT = 1,
  CF_CROSSFUSION_SINGLE = 2,
} cf_model_name;

// How the streams are fused.
typedef enum cf_fusion {
  CF_CONV2D = 0,
  CF_CONV1D = 1,
} cf_fusion;

// How weights and activations are stored; arithmetic and master weights are f32.
typedef enum cf_precision {
  CF_F32 = 0,
  CF_BF16 = 1,
} cf_precision;

// What a model keeps of each parameter.
typedef enum cf_state {
  CF_VALUES = 0,
  CF_GRADIENTS = 1,
} cf_state;

// Patients sorted by time, made once for many evaluations.
typedef struct cf_cohort cf_cohort;

// Where ops run: a CPU with so many threads, or a GPU and a stream of the caller's. Calls on one
// context run one after another, from any thread; contexts know nothing of each other.
typedef struct cf_context cf_context;

// A model with its parameters, gradients and Adam's moments. Calls on one model run one after
// another, from any thread.
typedef struct cf_model cf_model;

// What a model is built from.
typedef struct cf_config {
  // A `cf_model_name`.
  int32_t model;
  // Width of the patch features.
  uint32_t features;
  // Width of the model; published: 512.
  uint32_t dim;
  // Published: 4.
  uint32_t heads;
  // Published: 1.
  uint32_t layers;
  // Time bins; published: 4.
  uint32_t n_classes;
  // A `cf_fusion`.
  int32_t fusion;
  // Published: 0.3.
  double ffn_dropout;
  // Published: 0.2.
  double attention_dropout;
  // Published: 0.3.
  double fusion_dropout;
} cf_config;

// What a step on one slide takes.
typedef struct cf_plan {
  // Bytes at its peak, the model's state included.
  uint64_t peak_bytes;
  // Bytes of the step's arena alone.
  uint64_t arena_bytes;
  // Operations forward and backward (a multiply-add is two).
  double flop;
  // Operations of the forward pass.
  double forward_flop;
  // Kernels, where the device runs kernels.
  uint64_t launches;
} cf_plan;

// A slide's features [patches, features] in the host's memory, without gaps, in the model's precision;
// null at scales that the model does not read.
typedef struct cf_bags {
  const DLTensor *x5;
  const DLTensor *x10;
  const DLTensor *x20;
} cf_bags;

// Dropout of one tensor, by counter: an element's fate is a function of seed, step, site, row and
// column alone (docs/embedding.md), so that backward draws it again and every device draws the same.
typedef struct cf_dropout {
  // 0 drops nothing; at most 0.95.
  double rate;
  uint64_t seed;
  // A number that no two passes share.
  uint32_t step;
  // Tells a pass' dropouts apart; attention takes as many sites as heads.
  uint32_t site;
  // Null, or two numbers in the context's memory that are read when the op runs, in place of
  // seed and step: a captured CUDA graph draws anew if they have been changed meanwhile.
  const uint64_t *draw;
} cf_dropout;

// A slide's loss.
typedef struct cf_loss {
  // A `cf_loss_kind`.
  int32_t kind;
  // The time bin of the event or of the last visit, from 0.
  uint32_t label;
  // Whether no event was seen.
  bool censored;
  // Weighs the uncensored part up: 0.2 in published training, 0 in validation.
  double alpha;
  // How much of the gradient is summed: 1 / the slides of an update.
  double share;
} cf_loss;

// Adam (Kingma & Ba 2015) with L2 weight decay.
typedef struct cf_adam {
  double learning_rate;
  // This share of a weight is added to its gradient.
  double weight_decay;
  double beta1;
  double beta2;
  double epsilon;
} cf_adam;

// y = LayerNorm(x) of each row (epsilon 1e-5).
typedef struct cf_layer_norm {
  // [n0, d]
  const DLTensor *x;
  // [d]
  const DLTensor *weight;
  // [d]
  const DLTensor *bias;
  // [n, d], n0 <= n <= 2 n0: rows from n0 on repeat the first ones. Written.
  const DLTensor *y;
  // [n0, 2]: mean and 1 / sqrt(variance + epsilon), for backward. Written.
  const DLTensor *stats;
} cf_layer_norm;

// Gradients of `cf_layer_norm`.
typedef struct cf_layer_norm_grad {
  // [n0, d]
  const DLTensor *x;
  // [n0, 2], as forward wrote them.
  const DLTensor *stats;
  // [d]
  const DLTensor *weight;
  // [n, d]
  const DLTensor *dy;
  // [n0, d], overwritten.
  const DLTensor *dx;
  // [d], added to.
  const DLTensor *dweight;
  // [d], added to.
  const DLTensor *dbias;
} cf_layer_norm_grad;

// y = x W^T + bias; then GELU (exact) where `gelu` is given, dropout, and + residual.
typedef struct cf_linear {
  // [m, in]
  const DLTensor *x;
  // [out, in]
  const DLTensor *weight;
  // [out], or null.
  const DLTensor *bias;
  // [m, out], or null: takes what GELU is applied to, for backward. Written.
  const DLTensor *gelu;
  struct cf_dropout dropout;
  // [m, out], or null.
  const DLTensor *residual;
  // [m, out]. Written.
  const DLTensor *y;
} cf_linear;

// dx = dy W; then times GELU's derivative where `gelu` is given (of the layer before, whose output x
// is), dropout (of the layer before), and + residual.
typedef struct cf_linear_input_grad {
  // [m, out]
  const DLTensor *dy;
  // [out, in]
  const DLTensor *weight;
  // [m, in], or null: what the layer before gave to GELU.
  const DLTensor *gelu;
  struct cf_dropout dropout;
  // [m, in], or null.
  const DLTensor *residual;
  // dx +=, not =.
  bool accumulate;
  // [m, in]. Written.
  const DLTensor *dx;
} cf_linear_input_grad;

// dweight += dy^T x, dbias += the column sums of dy.
typedef struct cf_linear_weight_grad {
  // [m, out]
  const DLTensor *dy;
  // [m, in]
  const DLTensor *x;
  // [out, in], added to.
  const DLTensor *dweight;
  // [out], added to.
  const DLTensor *dbias;
} cf_linear_weight_grad;

// out = dropout(softmax(q k^T / sqrt(d / heads))) v of each head; head h owns columns h d / heads
// and on. Problems are groups of any lengths.
typedef struct cf_attention {
  // [n, d]
  const DLTensor *q;
  // [m, d]; no row gives out = 0.
  const DLTensor *k;
  // [m, d]
  const DLTensor *v;
  // Divides d, into at most 128 columns each.
  uint32_t heads;
  // Of the probabilities; head h draws at site + h.
  struct cf_dropout dropout;
  // [n, d]. Written.
  const DLTensor *out;
  // [heads, n]: log-sum-exp of the scaled scores, natural logarithm. Written.
  const DLTensor *lse;
} cf_attention;

// Gradients of `cf_attention`.
typedef struct cf_attention_grad {
  // What forward was given and what it wrote.
  struct cf_attention forward;
  // [n, d]
  const DLTensor *dout;
  // [n, d], overwritten.
  const DLTensor *dq;
  // [m, d], overwritten.
  const DLTensor *dk;
  // [m, d], overwritten.
  const DLTensor *dv;
} cf_attention_grad;

// A context that comes in parts: out, lse = those of the parts before together with this one.
typedef struct cf_attention_part {
  // [n, d], of this part alone.
  const DLTensor *part;
  // [heads, n], of this part alone.
  const DLTensor *part_lse;
  // [n, d], of the type of sums. Written.
  const DLTensor *out;
  // [heads, n]. Written.
  const DLTensor *lse;
  // Nothing has been merged yet: out and lse may hold anything.
  bool first;
} cf_attention_part;

// out = dropout(relu(the sum of grouped 7-, 5-, 3- and 1-tap convolutions of the mixed streams)).
typedef struct cf_conv_fusion {
  // Three streams [n, d] and their mix, or one (the others null) and no mix.
  const DLTensor *streams[3];
  // [3] and [1], or null: weight and bias of the streams' sum.
  const DLTensor *mix_weight;
  const DLTensor *mix_bias;
  // [d / 2, 2, side, side] of sides 7, 5, 3, 1; [d / 2, 2, side] for a sequence.
  const DLTensor *kernels[4];
  // [d / 2]
  const DLTensor *biases[4];
  // A `cf_grid`.
  int32_t grid;
  uint32_t extent;
  // Of whole channels.
  struct cf_dropout dropout;
  // [n, d / 2]. Written.
  const DLTensor *out;
} cf_conv_fusion;

// Gradients of `cf_conv_fusion`.
typedef struct cf_conv_fusion_grad {
  // What forward was given and what it wrote.
  struct cf_conv_fusion forward;
  // [n, d / 2]
  const DLTensor *dout;
  // [n, d], overwritten, as many as there are streams.
  const DLTensor *dstreams[3];
  // Added to, as all below; null where there is no mix.
  const DLTensor *dmix_weight;
  const DLTensor *dmix_bias;
  const DLTensor *dkernels[4];
  const DLTensor *dbiases[4];
} cf_conv_fusion_grad;

// y = x + conv7(x) + conv5(x) + conv3(x), depthwise on the tokens' square grid.
typedef struct cf_ppeg {
  // [first + side^2, c]; the first rows pass through.
  const DLTensor *x;
  uint32_t side;
  // [c, 1, side, side] of sides 7, 5, 3.
  const DLTensor *kernels[3];
  // [c]
  const DLTensor *biases[3];
  // As x. Written.
  const DLTensor *y;
} cf_ppeg;

// Gradients of `cf_ppeg`.
typedef struct cf_ppeg_grad {
  const DLTensor *x;
  uint32_t side;
  const DLTensor *kernels[3];
  // As x.
  const DLTensor *dy;
  // As x, overwritten.
  const DLTensor *dx;
  // Added to.
  const DLTensor *dkernels[3];
  // Added to.
  const DLTensor *dbiases[3];
} cf_ppeg_grad;

// logits = W LayerNorm(x) + b of one row.
typedef struct cf_head {
  // [d]
  const DLTensor *x;
  // [d]
  const DLTensor *norm_weight;
  // [d]
  const DLTensor *norm_bias;
  // [classes, d]; at most 32 classes on a GPU.
  const DLTensor *weight;
  // [classes]
  const DLTensor *bias;
  // [2], for backward. Written.
  const DLTensor *stats;
  // [d], for backward. Written.
  const DLTensor *normed;
  // [classes], of the type of sums. Written.
  const DLTensor *logits;
} cf_head;

// Gradients of `cf_head`.
typedef struct cf_head_grad {
  // What forward was given and what it wrote. `cf_head_loss` goes forward itself.
  struct cf_head forward;
  // [classes], of the type of sums.
  const DLTensor *dlogits;
  // [d], overwritten.
  const DLTensor *dx;
  // Added to, as all below.
  const DLTensor *dnorm_weight;
  const DLTensor *dnorm_bias;
  const DLTensor *dweight;
  const DLTensor *dbias;
} cf_head_grad;

// out = dropout(GELU(x)), or dropout(x).
typedef struct cf_gelu_dropout {
  // [m, n]
  const DLTensor *x;
  // Whether GELU (exact) comes before dropout.
  bool gelu;
  struct cf_dropout dropout;
  // [m, n]. Written.
  const DLTensor *out;
} cf_gelu_dropout;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

// The version of the library that is loaded: compare it with `CF_ABI_VERSION` of the header.
uint32_t cf_abi_version(void);

// What was wrong with this thread's last call that failed, in a sentence; until its next call that
// fails. Never null.
const char *cf_last_error(void);

// A context on this machine's CPU. `threads` = 0 takes one for each core that the process may use,
// a container's quota considered. A process may fork while no thread is inside a call on it, and
// go on using it on both sides.
//
enum cf_status cf_context_cpu(uint32_t threads, struct cf_context **out);

// A context on a GPU, in its primary context: all work goes to `stream` (a `cudaStream_t` or
// `CUstream` of that GPU; null is the default stream) in the order of the calls, and no call waits
// for it but those that say so.
//
enum cf_status cf_context_cuda(uint32_t ordinal, void *stream, struct cf_context **out);

// Waits for all work of the context so far.
//
enum cf_status cf_context_synchronize(const struct cf_context *context);

// Ends a context; null does nothing. Models that were made on it live on.
void cf_context_free(struct cf_context *context);

// A cohort of `n` patients: times (any unit), 1 where the event was seen, strata and weights (or
// null).
//
enum cf_status cf_cohort_new(const double *time,
                             const uint8_t *event,
                             const uint64_t *strata,
                             const double *weights,
                             size_t n,
                             struct cf_cohort **out);

// Ends a cohort; null does nothing.
void cf_cohort_free(struct cf_cohort *cohort);

// The log-likelihood of log-risks in the host's memory, and its gradient in them (either may be
// null): Cox 1972, O(n). On a GPU's context the kernels find it, and this waits for them.
//
enum cf_status cf_cox(const struct cf_context *context,
                      const struct cf_cohort *cohort,
                      int32_t ties,
                      const float *risk,
                      double *loglik,
                      float *gradient);

// The published model for features of a width.
//
enum cf_status cf_config_published(uint32_t features, struct cf_config *out);

// A fresh model, initialised from the seed as PyTorch would.
//
enum cf_status cf_model_create(const struct cf_context *context,
                               const struct cf_config *config,
                               int32_t precision,
                               uint64_t seed,
                               struct cf_model **out);

// The model of a checkpoint: `best.safetensors` of cf-train, or a published `.pt`, whose heads leave
// no trace in it and are given (published: 4; 0 where the file says it).
//
enum cf_status cf_model_load(const struct cf_context *context,
                             const char *path,
                             uint32_t heads,
                             int32_t precision,
                             struct cf_model **out);

// Ends a model; null does nothing.
void cf_model_free(struct cf_model *model);

// What the model is built from.
//
enum cf_status cf_model_config(const struct cf_model *model, struct cf_config *out);

// Steps may take so many bytes at their peak, the model's state included; 0: as many as they like.
// What does not fit is computed again.
//
enum cf_status cf_model_set_memory(const struct cf_model *model, uint64_t bytes);

// The plan for a slide of so many patches at 5x, 10x and 20x; nothing is computed.
//
enum cf_status cf_model_plan(const struct cf_model *model,
                             const uint64_t *patches,
                             bool training,
                             struct cf_plan *out);

// Hazards and survival of each time bin (`n_classes` numbers each, or null) and risk (or null) of a
// slide, without dropout. This waits.
//
enum cf_status cf_model_predict(const struct cf_model *model,
                                const struct cf_bags *slide,
                                double *hazards,
                                double *survival,
                                double *risk);

// The logits of a slide without dropout, `n_classes` numbers. This waits.
//
enum cf_status cf_model_logits(const struct cf_model *model,
                               const struct cf_bags *slide,
                               double *logits);

// Forward, a loss and backward of one slide: `loss.share` of its gradient is added to the model's.
// `dropout` gives seed and step of the model's own dropouts (its rate and site are not looked at);
// null is no dropout. Loss and risk may be null. This waits.
//
enum cf_status cf_model_accumulate(const struct cf_model *model,
                                   const struct cf_bags *slide,
                                   const struct cf_dropout *dropout,
                                   const struct cf_loss *loss,
                                   double *value,
                                   double *risk);

// One update of all parameters by the gradients, which are zero afterwards.
//
enum cf_status cf_model_update(const struct cf_model *model, const struct cf_adam *adam);

// Writes the parameters under their published names as safetensors, whole or not at all.
//
enum cf_status cf_model_save(const struct cf_model *model, const char *path);

// How many parameter tensors the model has; 0 of null.
//
size_t cf_model_parameters(const struct cf_model *model);

// The published name of the `i`-th parameter tensor, as long as the model lives; null past the end.
//
const char *cf_model_parameter_name(const struct cf_model *model, size_t i);

// The numbers of a parameter tensor by its published name, or of its gradient: `len` of them, row by
// row. With `numbers` null, `len` takes how many there are. This waits.
//
enum cf_status cf_model_read(const struct cf_model *model,
                             int32_t state,
                             const char *name,
                             float *numbers,
                             size_t *len);

enum cf_status cf_layer_norm_forward(const struct cf_context *context,
                                     const struct cf_layer_norm *problems,
                                     size_t count);

enum cf_status cf_layer_norm_backward(const struct cf_context *context,
                                      const struct cf_layer_norm_grad *problems,
                                      size_t count);

enum cf_status cf_linear_forward(const struct cf_context *context,
                                 const struct cf_linear *problems,
                                 size_t count);

enum cf_status cf_linear_backward_input(const struct cf_context *context,
                                        const struct cf_linear_input_grad *problems,
                                        size_t count);

enum cf_status cf_linear_backward_weight(const struct cf_context *context,
                                         const struct cf_linear_weight_grad *problems,
                                         size_t count);

enum cf_status cf_attention_forward(const struct cf_context *context,
                                    const struct cf_attention *problems,
                                    size_t count);

enum cf_status cf_attention_backward(const struct cf_context *context,
                                     const struct cf_attention_grad *problems,
                                     size_t count);

enum cf_status cf_attention_merge(const struct cf_context *context,
                                  const struct cf_attention_part *problems,
                                  size_t count);

enum cf_status cf_conv_fusion_forward(const struct cf_context *context,
                                      const struct cf_conv_fusion *problem);

enum cf_status cf_conv_fusion_backward(const struct cf_context *context,
                                       const struct cf_conv_fusion_grad *problem);

enum cf_status cf_ppeg_forward(const struct cf_context *context,
                               const struct cf_ppeg *problems,
                               size_t count);

enum cf_status cf_ppeg_backward(const struct cf_context *context,
                                const struct cf_ppeg_grad *problems,
                                size_t count);

enum cf_status cf_head_forward(const struct cf_context *context, const struct cf_head *problem);

// From dlogits.
//
enum cf_status cf_head_backward(const struct cf_context *context,
                                const struct cf_head_grad *problem);

// From x to a survival loss of the logits and back, on the device: `result` [2], f64, takes loss and
// risk.
//
enum cf_status cf_head_loss(const struct cf_context *context,
                            const struct cf_head_grad *problem,
                            const struct cf_loss *loss,
                            const DLTensor *result);

// A survival loss of logits in the host's memory, and its gradient in them.
//
enum cf_status cf_loss_evaluate(const struct cf_loss *loss,
                                const double *logits,
                                size_t classes,
                                double *value,
                                double *gradient);

enum cf_status cf_gelu_dropout_forward(const struct cf_context *context,
                                       const struct cf_gelu_dropout *problems,
                                       size_t count);

// The `step`-th update (from 1) of parameters [n]. `weights` takes them rounded to bf16; null where
// ops read the parameters themselves. The gradients are zero afterwards.
//
enum cf_status cf_adam_step(const struct cf_context *context,
                            const struct cf_adam *adam,
                            uint64_t step,
                            const DLTensor *params,
                            const DLTensor *weights,
                            const DLTensor *grads,
                            const DLTensor *first_moment,
                            const DLTensor *second_moment);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* CROSSFUSION_H */
