/* Models: their weights and threads. */
#include "model.h"

#include <stdlib.h>
#include <string.h>

static const struct {
  const char *name, *dtype;
  tensor_shape shape;
} weights[WEIGHTS] = WEIGHT_TABLE;

const layer_sizes layers[LAYERS] = LAYER_TABLE;

int ramnet_vocabulary(void) { return VOCABULARY; }

int ramnet_layers(void) { return LAYERS; }

int ramnet_heads(int layer) { return layer < 0 || layer >= LAYERS ? 0 : layers[layer].heads; }

int ramnet_slots(int layer) { return layer < 0 || layer >= LAYERS ? 0 : layers[layer].slots; }

int ramnet_top_k(int layer) { return layer < 0 || layer >= LAYERS ? 0 : layers[layer].top_k; }

int ramnet_weight_count(void) { return WEIGHTS; }

const char* ramnet_weight_name(int index) { return index < 0 || index >= WEIGHTS ? NULL : weights[index].name; }

static int with_threads(ramnet_model* model, int threads) {
  if (threads < 1 || threads > 1024)
    return fail(RAMNET_BAD_ARGUMENT, "threads is %d; it must be in 1..1024", threads);
  if (threads > 1 && (model->pool = pool_start(threads)) == NULL)
    return fail(RAMNET_NO_MEMORY, "the system does not start %d threads", threads);
  model->executor = (executor){pool_run, model->pool, threads};
  return RAMNET_OK;
}

int open_named(const char* name, const void* bytes, size_t size, int threads, ramnet_model** opened) {
  tensor_file file;
  int status = read_tensors(&file, name, bytes, size);
  if (status) return status;
  ramnet_model* model = calloc(1, sizeof *model);
  if (model == NULL) return fail(RAMNET_NO_MEMORY, "there is no memory for a model");
  for (int i = 0; status == 0 && i < WEIGHTS; i++)
    if (weights[i].dtype != NULL) /* a matrix of floating numbers has no scales */
      status = find_tensor(&file, weights[i].name, weights[i].dtype, weights[i].shape, &model->weights[i]);
  if (status == 0) status = check_sums(&file, CONFIG);
  if (status == 0) status = with_threads(model, threads);
  if (status) {
    ramnet_close(model);
    return status;
  }
  *opened = model;
  return RAMNET_OK;
}

int ramnet_open_bytes(const void* weights_file, size_t size, int threads, ramnet_model** model) {
  if ((uintptr_t)weights_file % sizeof(int64_t) != 0)
    return fail(RAMNET_BAD_ARGUMENT, "the weights file is at address %zu; it must be a multiple of %zu",
                (size_t)(uintptr_t)weights_file, sizeof(int64_t));
  const int status = choose_kernels();
  return status ? status : open_named("the weights file", weights_file, size, threads, model);
}

int ramnet_wrap(const void* const* given, int threads, ramnet_model** made) {
  int status = choose_kernels();
  if (status) return status;
  ramnet_model* model = calloc(1, sizeof *model);
  if (model == NULL) return fail(RAMNET_NO_MEMORY, "there is no memory for a model");
  status = with_threads(model, threads);
  if (status) {
    free(model);
    return status;
  }
  memcpy(model->weights, given, sizeof model->weights);
  *made = model;
  return RAMNET_OK;
}

void ramnet_rebind(ramnet_model* model, const void* const* given) {
  memcpy(model->weights, given, sizeof model->weights);
}

void ramnet_use_runtime(ramnet_model* model, ramnet_parallel parallel, void* runtime, int threads) {
  pool_stop(model->pool);
  model->pool = NULL;
  model->executor = (executor){parallel, runtime, threads};
}

void ramnet_close(ramnet_model* model) {
  if (model == NULL) return;
  pool_stop(model->pool);
  if (model->unmap != NULL) model->unmap(model->mapped, model->mapped_bytes);
  free(model);
}
