/* Models: their weights and threads. */
#include "model.h"

#include <stdlib.h>
#include <string.h>

#include "files.h"

static const struct {
  const char *name, *dtype;
  tensor_shape shape;
} weights[WEIGHTS] = WEIGHT_TABLE;

int ramnet_vocabulary(void) { return VOCABULARY; }

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

int ramnet_open(const char* path, int threads, ramnet_model** opened) {
  mapping file;
  ramnet_model* model = calloc(1, sizeof *model);
  if (model == NULL) return fail(RAMNET_NO_MEMORY, "there is no memory for a model");
  int status = map_tensors(path, &file);
  if (status) {
    free(model);
    return status;
  }
  model->mapped = (void*)file.bytes;
  model->mapped_bytes = file.size;
  for (int i = 0; status == 0 && i < WEIGHTS; i++)
    if (weights[i].dtype != NULL) /* a matrix of floating numbers has no scales */
      status = find_tensor(&file, weights[i].name, weights[i].dtype, weights[i].shape, &model->weights[i]);
  if (status == 0) status = with_threads(model, threads);
  if (status) {
    ramnet_close(model);
    return status;
  }
  *opened = model;
  return RAMNET_OK;
}

int ramnet_wrap(const void* const* given, int threads, ramnet_model** made) {
  ramnet_model* model = calloc(1, sizeof *model);
  if (model == NULL) return fail(RAMNET_NO_MEMORY, "there is no memory for a model");
  const int status = with_threads(model, threads);
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
  if (model->mapped != NULL) unmap(&(mapping){.bytes = model->mapped, .size = model->mapped_bytes});
  free(model);
}
