/* Loads a model, takes one training step on a slide in memory, and compares logits and gradients with
 * those of a folder that was made from PyTorch's (c/tests/c_program.rs writes one):
 *
 *     cargo build --release
 *     cc -std=c11 -Iinclude examples/c/golden.c -Ltarget/release -lcrossfusion -lm -o golden
 *     LD_LIBRARY_PATH=target/release ./golden FOLDER [cpu|cuda]
 */
#include <crossfusion.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* What a program does with a call that fails: here, it ends. */
static void check(cf_status status, const char *what) {
  if (status == CF_OK) return;
  fprintf(stderr, "%s: %s\n", what, cf_last_error());
  exit(1);
}

/* All numbers of a file; the caller frees them. */
static void *numbers(const char *folder, const char *name, size_t size, size_t *count) {
  char path[4096];
  snprintf(path, sizeof path, "%s/%s", folder, name);
  FILE *file = fopen(path, "rb");
  if (!file) {
    perror(path);
    exit(1);
  }
  fseek(file, 0, SEEK_END);
  *count = (size_t)ftell(file) / size;
  rewind(file);
  void *all = malloc(*count * size + 1);
  if (fread(all, size, *count, file) != *count) exit(1);
  fclose(file);
  return all;
}

/* The distance of two gradients, and the length of the second. */
static void compare(const float *got, const float *expected, size_t n, double *distance, double *length) {
  *distance = *length = 0;
  for (size_t i = 0; i < n; i++) {
    const double d = (double)got[i] - expected[i];
    *distance += d * d;
    *length += (double)expected[i] * expected[i];
  }
  *distance = sqrt(*distance);
  *length = sqrt(*length);
}

int main(int argc, char **argv) {
  if (argc < 2) {
    fprintf(stderr, "usage: golden FOLDER [cpu|cuda]\n");
    return 2;
  }
  const char *folder = argv[1];
  if (cf_abi_version() != CF_ABI_VERSION) {
    fprintf(stderr, "header and library are of different versions\n");
    return 1;
  }

  cf_context *context;
  if (argc > 2 && strcmp(argv[2], "cuda") == 0) check(cf_context_cuda(0, NULL, &context), "context");
  else check(cf_context_cpu(0, &context), "context");

  char path[4096];
  snprintf(path, sizeof path, "%s/model.safetensors", folder);
  cf_model *model;
  check(cf_model_load(context, path, 0, CF_F32, &model), "load");
  cf_config config;
  check(cf_model_config(model, &config), "config");

  /* the slide: a matrix of features at each magnification, where it lies */
  static const char *names[3] = {"x5.f32", "x10.f32", "x20.f32"};
  DLTensor bags[3];
  int64_t shapes[3][2];
  uint64_t patches[3];
  for (int i = 0; i < 3; i++) {
    size_t count;
    float *features = numbers(folder, names[i], sizeof(float), &count);
    patches[i] = count / config.features;
    shapes[i][0] = (int64_t)patches[i];
    shapes[i][1] = config.features;
    bags[i] = (DLTensor){features, {1, 0}, 2, {2, 32, 1}, shapes[i], NULL, 0};
  }
  const cf_bags slide = {&bags[0], &bags[1], &bags[2]};

  cf_plan plan;
  check(cf_model_plan(model, patches, true, &plan), "plan");
  printf("a step takes %.1f MiB and %.2f GFLOP\n", (double)plan.peak_bytes / 1048576, plan.flop * 1e-9);

  /* logits, and what they say */
  size_t classes;
  double *expected = numbers(folder, "logits.f64", sizeof(double), &classes);
  double *logits = malloc(classes * sizeof(double)), risk;
  check(cf_model_logits(model, &slide, logits), "logits");
  check(cf_model_predict(model, &slide, NULL, NULL, &risk), "predict");
  for (size_t i = 0; i < classes; i++)
    if (!(fabs(logits[i] - expected[i]) <= 1e-5 * fmax(fabs(expected[i]), 1))) {
      fprintf(stderr, "logit %zu is %.9g, expected %.9g\n", i, logits[i], expected[i]);
      return 1;
    }

  /* one slide's gradients: label, censored, alpha */
  size_t three;
  double *outcome = numbers(folder, "loss.f64", sizeof(double), &three);
  const cf_loss loss = {CF_NLL_SURV, (uint32_t)outcome[0], outcome[1] != 0, outcome[2], 1.0};
  double value;
  check(cf_model_accumulate(model, &slide, NULL, &loss, &value, NULL), "accumulate");
  printf("risk %.6f, loss %.6f\n", risk, value);

  /* the largest gradient bounds what rounding may do to the others */
  double largest = 0, worst = 0;
  size_t compared = 0;
  for (int pass = 0; pass < 2; pass++)
    for (size_t i = 0; i < cf_model_parameters(model); i++) {
      const char *name = cf_model_parameter_name(model, i);
      size_t n, count;
      check(cf_model_read(model, CF_GRADIENTS, name, NULL, &n), name);
      char file[512];
      snprintf(file, sizeof file, "grad.%s.f32", name);
      float *truth = numbers(folder, file, sizeof(float), &count), *got = malloc(n * sizeof(float));
      if (count != n) {
        fprintf(stderr, "%s has %zu numbers, expected %zu\n", name, n, count);
        return 1;
      }
      check(cf_model_read(model, CF_GRADIENTS, name, got, &n), name);
      double distance, length;
      compare(got, truth, n, &distance, &length);
      if (pass == 0) {
        largest = fmax(largest, length);
      } else {
        const double error = distance / (length + 1e-4 * largest);
        worst = fmax(worst, error);
        compared++;
        if (!(error <= 1e-4)) {
          fprintf(stderr, "the gradient of %s is off by %.1e\n", name, error);
          return 1;
        }
      }
      free(truth);
      free(got);
    }
  printf("%zu gradients agree, the worst to %.1e\n", compared, worst);

  /* an update, and what is saved is what is loaded */
  const cf_adam adam = {1e-4, 4e-6, 0.9, 0.999, 1e-8};
  check(cf_model_update(model, &adam), "update");
  snprintf(path, sizeof path, "%s/updated.safetensors", folder);
  check(cf_model_save(model, path), "save");
  cf_model *again;
  check(cf_model_load(context, path, 0, CF_F32, &again), "load again");
  double after[2];
  check(cf_model_predict(model, &slide, NULL, NULL, &after[0]), "predict");
  check(cf_model_predict(again, &slide, NULL, NULL, &after[1]), "predict");
  if (after[0] != after[1] || after[0] == risk) {
    fprintf(stderr, "risk %.9g before, %.9g after, %.9g when loaded again\n", risk, after[0], after[1]);
    return 1;
  }

  /* a mistake is said by name */
  bags[0].dtype.code = 0;
  if (cf_model_logits(model, &slide, logits) != CF_USAGE || !strstr(cf_last_error(), "x5 is of int32")) {
    fprintf(stderr, "a bag of integers: %s\n", cf_last_error());
    return 1;
  }

  cf_model_free(again);
  cf_model_free(model);
  cf_context_free(context);
  for (int i = 0; i < 3; i++) free(bags[i].data);
  free(logits);
  free(expected);
  free(outcome);
  return 0;
}
