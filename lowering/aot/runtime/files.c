#include "files.h"

#include <stdio.h>
#include <string.h>

#include "kernels.h"

enum { PREFIX = 8 };

/* A place in the header. Functions that read move it, and return 0 if the text is not what they expect. */
typedef struct {
  const char *at, *end;
} cursor;

typedef struct {
  string name, dtype;
  tensor_shape shape;
  int64_t begin, end;
} entry;

static void skip_space(cursor* c) {
  while (c->at < c->end && (*c->at == ' ' || *c->at == '\n' || *c->at == '\t' || *c->at == '\r')) c->at++;
}

static int next_is(cursor* c, char wanted) {
  skip_space(c);
  if (c->at == c->end || *c->at != wanted) return 0;
  c->at++;
  return 1;
}

static int read_string(cursor* c, string* s) {
  if (!next_is(c, '"')) return 0;
  s->text = c->at;
  while (c->at < c->end && *c->at != '"') c->at += *c->at == '\\' && c->end - c->at > 1 ? 2 : 1;
  if (c->at >= c->end) return 0;
  s->length = (size_t)(c->at++ - s->text);
  return 1;
}

static int read_integer(cursor* c, int64_t* value) {
  skip_space(c);
  if (c->at == c->end || *c->at < '0' || *c->at > '9') return 0;
  for (*value = 0; c->at < c->end && *c->at >= '0' && *c->at <= '9'; c->at++) {
    if (*value > INT64_MAX / 16) return 0;
    *value = *value * 10 + (*c->at - '0');
  }
  return 1;
}

/* Read [a, b, ...] of at most `most` numbers. */
static int read_integers(cursor* c, int64_t* values, int most, int* count) {
  *count = 0;
  if (!next_is(c, '[')) return 0;
  if (next_is(c, ']')) return 1;
  do {
    if (*count == most || !read_integer(c, &values[(*count)++])) return 0;
  } while (next_is(c, ','));
  return next_is(c, ']');
}

static int equals(string s, const char* text) {
  return s.length == strlen(text) && memcmp(s.text, text, s.length) == 0;
}

/* Read the object of a tensor. */
static int read_fields(cursor* c, entry* e) {
  int64_t offsets[2];
  int count, seen = 0;
  if (!next_is(c, '{')) return 0;
  do {
    string key;
    if (!read_string(c, &key) || !next_is(c, ':')) return 0;
    if (equals(key, "dtype")) {
      if (!read_string(c, &e->dtype)) return 0;
      seen |= 1;
    } else if (equals(key, "shape")) {
      if (!read_integers(c, e->shape.sizes, 4, &e->shape.rank)) return 0;
      seen |= 2;
    } else if (equals(key, "data_offsets")) {
      if (!read_integers(c, offsets, 2, &count) || count != 2) return 0;
      e->begin = offsets[0], e->end = offsets[1];
      seen |= 4;
    } else {
      return 0;
    }
  } while (next_is(c, ','));
  return seen == 7 && next_is(c, '}');
}

/* Read {"name": "text", ...}. */
static int read_metadata(cursor* c, tensor_file* file) {
  string name, text;
  if (!next_is(c, '{')) return 0;
  if (next_is(c, '}')) return 1;
  do {
    if (!read_string(c, &name) || !next_is(c, ':') || !read_string(c, &text)) return 0;
    if (equals(name, "ramnet.config")) file->config = text;
    if (equals(name, "ramnet.sums")) file->sums = text;
  } while (next_is(c, ','));
  return next_is(c, '}');
}

/* Read the next tensor after "{" or ","; *more says whether another follows. */
static int read_entry(cursor* c, tensor_file* file, entry* e, int* is_tensor, int* more) {
  if (!read_string(c, &e->name) || !next_is(c, ':')) return 0;
  *is_tensor = !equals(e->name, "__metadata__");
  if (!(*is_tensor ? read_fields(c, e) : read_metadata(c, file))) return 0;
  *more = next_is(c, ',');
  return *more || next_is(c, '}');
}

static cursor header_of(const tensor_file* file) {
  return (cursor){file->bytes + PREFIX, file->bytes + PREFIX + file->header};
}

int read_tensors(tensor_file* file, const char* name, const void* bytes, size_t size) {
  uint64_t header = 0;
  *file = (tensor_file){.name = name, .bytes = bytes, .size = size};
  if (file->size < PREFIX) return fail(RAMNET_BAD_FILE, "%s is not a safetensors file: it is too short", file->name);
  for (int i = PREFIX - 1; i >= 0; i--) header = header << 8 | (unsigned char)file->bytes[i];
  if (header > file->size - PREFIX)
    return fail(RAMNET_BAD_FILE, "%s is not a safetensors file, or it was cut", file->name);
  file->header = (size_t)header;
  const int64_t data = (int64_t)(file->size - PREFIX - file->header);
  cursor c = header_of(file);
  int more = next_is(&c, '{');
  if (!more) return fail(RAMNET_BAD_FILE, "%s is not a safetensors file", file->name);
  while (more) {
    entry e;
    int is_tensor;
    if (!read_entry(&c, file, &e, &is_tensor, &more)) return fail(RAMNET_BAD_FILE, "%s has a damaged header", file->name);
    if (!is_tensor) continue;
    if (e.begin > e.end || e.end > data)
      return fail(RAMNET_BAD_FILE, "%s was cut: %.*s lies outside of it", file->name,
                  (int)(e.name.length < 64 ? e.name.length : 64), e.name.text);
    file->tensors++;
  }
  return RAMNET_OK;
}

static int size_of(const char* dtype) {
  if (strcmp(dtype, "I64") == 0) return 8;
  return strcmp(dtype, "F32") == 0 ? 4 : strcmp(dtype, "BF16") == 0 ? 2 : 1;
}

int find_tensor(const tensor_file* file, const char* name, const char* dtype, tensor_shape shape, const void** data) {
  cursor c = header_of(file);
  tensor_file unused;
  int more = next_is(&c, '{'), is_tensor;
  entry e = {{NULL, 0}, {NULL, 0}, {0, {0}}, 0, 0};
  while (more) {
    if (!read_entry(&c, &unused, &e, &is_tensor, &more)) break;
    if (is_tensor && equals(e.name, name)) goto found;
  }
  return fail(RAMNET_BAD_FILE, "%s has no tensor %s; it is of another model", file->name, name);
found:;
  int fits = equals(e.dtype, dtype) && e.shape.rank == shape.rank;
  int64_t bytes = size_of(dtype);
  for (int i = 0; i < shape.rank; i++) {
    fits = fits && e.shape.sizes[i] == shape.sizes[i];
    bytes *= shape.sizes[i];
  }
  const size_t at = PREFIX + file->header + (size_t)e.begin;
  if (!fits)
    return fail(RAMNET_BAD_FILE, "%s: %s is %.*s of another shape or type; this model has %s", file->name, name,
                (int)(e.dtype.length < 16 ? e.dtype.length : 16), e.dtype.text, dtype);
  if (e.end - e.begin != bytes || at % (size_t)size_of(dtype) != 0)
    return fail(RAMNET_BAD_FILE, "%s: the data of %s is not where its shape says", file->name, name);
  *data = file->bytes + at;
  return RAMNET_OK;
}

int check_sums(const tensor_file* file, const char* config) {
  if (file->config.text != NULL && !equals(file->config, config))
    return fail(RAMNET_BAD_FILE, "%s is of another model", file->name);
  if (file->sums.text == NULL) return RAMNET_OK;
  const char *at = file->bytes + PREFIX + file->header, *end = file->bytes + file->size;
  uint64_t sum[2] = {0, 0}, of_sums[2] = {0, 0};
  while (at < end) {
    unsigned char last[8] = {0}; /* zeros follow the data */
    uint32_t words[2];
    const size_t left = (size_t)(end - at);
    if (left < sizeof words) memcpy(last, at, left);
    memcpy(words, left < sizeof words ? (const char*)last : at, sizeof words);
    for (int i = 0; i < 2; i++) of_sums[i] += sum[i] += words[i];
    at += left < sizeof words ? left : sizeof words;
  }
  char found[65];
  snprintf(found, sizeof found, "%016llx%016llx%016llx%016llx", (unsigned long long)sum[0], (unsigned long long)sum[1],
           (unsigned long long)of_sums[0], (unsigned long long)of_sums[1]);
  if (!equals(file->sums, found)) return fail(RAMNET_BAD_FILE, "%s is damaged: its data was altered", file->name);
  return RAMNET_OK;
}

void declare_tensor(const char* name, const char* dtype, tensor_shape shape, size_t begin, put_bytes* put, void* to) {
  char text[256];
  size_t bytes = (size_t)size_of(dtype);
  int used = snprintf(text, sizeof text, "%c\"%s\":{\"dtype\":\"%s\",\"shape\":[", begin ? ',' : '{', name, dtype);
  for (int i = 0; i < shape.rank; i++) {
    used += snprintf(text + used, sizeof text - (size_t)used, "%s%lld", i ? "," : "", (long long)shape.sizes[i]);
    bytes *= (size_t)shape.sizes[i];
  }
  used += snprintf(text + used, sizeof text - (size_t)used, "],\"data_offsets\":[%zu,%zu]}", begin, begin + bytes);
  put(to, text, (size_t)used);
}

void put_header_size(size_t bytes, put_bytes* put, void* to) {
  unsigned char size[PREFIX];
  for (int i = 0; i < PREFIX; i++) size[i] = (unsigned char)((uint64_t)bytes >> 8 * i);
  put(to, size, PREFIX);
}
