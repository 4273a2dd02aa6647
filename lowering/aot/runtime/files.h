/* safetensors files: eight bytes of the header's size, a JSON header, then the tensors. */
#ifndef RAMNET_FILES_H
#define RAMNET_FILES_H

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

typedef struct {
  int rank;
  int64_t sizes[4];
} tensor_shape;

/* A file in memory. */
typedef struct {
  const char* path;
  const char* bytes;
  size_t size;
  size_t header; /* bytes of the header */
  int tensors;
} mapping;

int map_tensors(const char* path, mapping* file);
void unmap(const mapping* file);

/* Find a tensor that must be of this type and shape. */
int find_tensor(const mapping* file, const char* name, const char* dtype, tensor_shape shape, const void** data);

/* A file that is written beside its name, which it takes at the end. */
typedef struct {
  const char* path;
  char aside[4096];
  FILE* stream;
  char* header;
  size_t used, capacity, offset;
  int failed;
} tensor_file;

int file_create(tensor_file* file, const char* path);
void file_declare(tensor_file* file, const char* name, const char* dtype, tensor_shape shape, size_t bytes);
void file_write(tensor_file* file, const void* data, size_t bytes);
int file_finish(tensor_file* file);

#endif
