// As much of JSON as the manifest needs: escapes are those of quotes and backslashes.
#pragma once
#include <stdexcept>
#include <string>
#include <vector>

struct Json {
  double number = 0; // of null, true and false, too
  std::string text;
  std::vector<std::string> keys; // of an object, whose values are the items
  std::vector<Json> items;

  const Json& operator[](const std::string& key) const {
    for (size_t i = 0; i < keys.size(); ++i) {
      if (keys[i] == key) return items[i];
    }
    throw std::runtime_error("the manifest has no \"" + key + "\"");
  }

  static Json read(const std::string& s, size_t&& at = 0) { return value(s, at); }

 private:
  static char next(const std::string& s, size_t& at) {
    at = s.find_first_not_of(" \n\r\t,:", at);
    if (at == std::string::npos) throw std::runtime_error("the manifest ends too early");
    return s[at];
  }

  static Json value(const std::string& s, size_t& at) {
    Json found;
    char first = next(s, at);
    if (first == '"') {
      for (++at; s.at(at) != '"'; ++at) found.text += s[at] == '\\' ? s.at(++at) : s[at];
      ++at;
    } else if (first == '{' || first == '[') {
      for (++at; next(s, at) != '}' && s[at] != ']';) {
        if (first == '{') found.keys.push_back(value(s, at).text);
        found.items.push_back(value(s, at));
      }
      ++at;
    } else {
      size_t end = s.find_first_of(",]} \r\n", at);
      if (first == '-' || (first >= '0' && first <= '9')) found.number = std::stod(s.substr(at, end - at));
      at = end;
    }
    return found;
  }
};
