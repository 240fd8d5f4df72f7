// As much of JSON as the manifest needs.
#pragma once
#include <cctype>
#include <stdexcept>
#include <string>
#include <vector>

struct Json {
  double number = 0;
  std::string text;
  std::vector<std::string> keys; // of an object, whose values are the items
  std::vector<Json> items;

  const Json& operator[](const std::string& key) const {
    for (size_t i = 0; i < keys.size(); ++i) {
      if (keys[i] == key) return items[i];
    }
    throw std::runtime_error("the manifest has no \"" + key + "\"");
  }

  static Json parse(const std::string& source) {
    size_t at = 0;
    return value(source, at);
  }

 private:
  static char next(const std::string& s, size_t& at) {
    while (at < s.size() && std::isspace(static_cast<unsigned char>(s[at]))) ++at;
    if (at == s.size()) throw std::runtime_error("the manifest ends too early");
    return s[at];
  }

  static std::string string(const std::string& s, size_t& at) {
    std::string found;
    for (++at; s.at(at) != '"'; ++at) {
      if (s[at] == '\\') ++at; // names of files have no others than quotes and backslashes
      found += s.at(at);
    }
    ++at;
    return found;
  }

  static Json value(const std::string& s, size_t& at) {
    Json found;
    char first = next(s, at);
    if (first == '"') {
      found.text = string(s, at);
    } else if (first == '{' || first == '[') {
      for (++at; next(s, at) != '}' && s[at] != ']';) {
        if (s[at] == ',') {
          ++at;
          continue;
        }
        if (first == '{') {
          found.keys.push_back(string(s, at));
          next(s, at);
          ++at; // the colon
        }
        found.items.push_back(value(s, at));
      }
      ++at;
    } else { // a number; true, false and null read as 0
      size_t end = s.find_first_of(",]} \r\n", at);
      found.number = std::isalpha(static_cast<unsigned char>(first)) ? 0 : std::stod(s.substr(at, end - at));
      at = end;
    }
    return found;
  }
};
