/* safetensors files: eight bytes of the header's size, a JSON header, then the tensors. */
#ifndef RAMNET_FILES_H
#define RAMNET_FILES_H

#include <stddef.h>
#include <stdint.h>

typedef struct {
  int rank;
  int64_t sizes[4];
} tensor_shape;

/* A part of the header; its text is NULL if there is none. */
typedef struct {
  const char* text;
  size_t length;
} string;

/* A file in memory. */
typedef struct {
  const char* name; /* what messages call it */
  const char* bytes;
  size_t size;
  size_t header; /* bytes of the header */
  int tensors;
  string config, sums; /* values of the header's metadata */
} tensor_file;

/* Check the header of a file. */
int read_tensors(tensor_file* file, const char* name, const void* bytes, size_t size);

/* Find a tensor that must be of this type and shape. */
int find_tensor(const tensor_file* file, const char* name, const char* dtype, tensor_shape shape, const void** data);

/* Check that the file's metadata, if it says, is of this configuration, and that the data has the sums that it had. */
int check_sums(const tensor_file* file, const char* config);

/* Takes the bytes of a file that is written, in order. */
typedef void put_bytes(void* to, const void* data, size_t bytes);

/* Write a tensor's part of a header, without the brace that ends the header. `begin` is 0 for the first tensor. */
void declare_tensor(const char* name, const char* dtype, tensor_shape shape, size_t begin, put_bytes* put, void* to);

/* Write the size of the header, which comes before it. */
void put_header_size(size_t bytes, put_bytes* put, void* to);

#endif
